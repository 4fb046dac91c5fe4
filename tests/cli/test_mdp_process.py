"""What the commands of ``trueup mdp`` share: mistakes in the process and the picture, progress, files."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from trueup.cli.main import main
from trueup.cli.mdp_process import watching
from trueup.runs.progress import RunProgress

COMMANDS = ("solve", "estimate", "learn")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "which process?"),
        (["--process", "chian"], "there is no process 'chian'"),
        (["--process", "missing.json"], "missing.json: can't be read"),
        (["--process", "cliff", "--gamma", "2"], "--gamma: is 2.0, but must be at most 1"),
        (["--process", "cliff", "--figure", "cliff.gif"], "--figure: unknown ending '.gif'"),
        (["--process", "cliff", "--figure", "cliff"], "→ one of .png, .svg, .pdf"),
        (["--process", "gymnasium:NoSuch-v0"], "NoSuch-v0"),
        (["--process", "gymnasium:Blackjack-v1"], "no table of its dynamics"),
    ],
)
def test_mistakes(command: str, given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mdp", command, *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_packages_are_told_with_their_extra_before_anything_runs(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert main(["mdp", command, "--process", "gymnasium:FrozenLake-v1"]) == 2
    assert "pip install 'trueup[control]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["mdp", command, "--process", "cliff", "--figure", str(tmp_path / "cliff.png")]) == 2
    told = capsys.readouterr()
    assert "pip install 'trueup[plots]'" in told.err
    assert told.out == ""


def test_a_picture_that_can_t_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["mdp", "solve", "--process", "chain", "--figure", str(tmp_path / "file" / "chain.png")]) == 2
    assert "--figure: " in (told := capsys.readouterr().err)
    assert "can't be written" in told


def test_halves_are_told_on_the_way() -> None:
    console = Console(file=io.StringIO(), width=200)
    with RunProgress(1000, title="td", console=console) as progress:
        look = watching(progress, 10, lambda now: {"distance": float(now.mean())})
        for done in (1, 3, 5, 10):
            look(done, np.full(3, 1 / done))
        assert progress.done == 1000
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue().splitlines()
    assert told[:2] == ["td: 30% · distance 0.3333", "td: 50% · distance 0.2"]
    assert told[2].startswith("td step 1000/1000 · distance 0.1 · ")
    assert len(told) == 3
