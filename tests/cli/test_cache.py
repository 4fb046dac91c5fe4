"""What is kept between runs is listed, and removed where that is asked for, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from trueup.cli.cache import age, size
from trueup.cli.main import main


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Log-probs of today and of ten days ago, a damaged file, and a model of twenty days ago."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRUEUP_CACHE", str(folder))
    monkeypatch.setenv("TRUEUP_KEEP_MEMORY", "0")
    for path in (folder / "reference", folder / "models" / "llm-1.0"):
        path.mkdir(parents=True)
    values, about = {"logprobs": np.zeros(1000, dtype=np.float32)}, {"model": "models/tiny", "data": "pairs.jsonl"}
    save_file(values, folder / "reference" / "new.safetensors", metadata=about)
    save_file(values, folder / "reference" / "old.safetensors")
    (folder / "reference" / "cut.safetensors").write_bytes(b"half")
    (folder / "models" / "llm-1.0" / "model.safetensors").write_bytes(bytes(3_000_000))
    for days, path in ((10, folder / "reference" / "old.safetensors"), (20, folder / "models" / "llm-1.0")):
        os.utime(path, (time.time() - days * 86400,) * 2)
    (folder / "llm_1.0.whl").write_bytes(b"mine")
    return folder


def left(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*/*")}


EVERYTHING = {"new.safetensors", "old.safetensors", "cut.safetensors", "llm-1.0"}


def test_all_of_it_is_listed(cache: Path, capsys: pytest.CaptureFixture):
    assert main(["cache"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1] == f"{cache}: 4 entries, 3.0 MB"
    assert {"reference 4.1 kB 0 hours models/tiny, pairs.jsonl", "reference 4.1 kB 10 days old.safetensors"} < set(
        lines
    )
    assert "reference 0.0 kB 0 hours cut.safetensors, damaged" in lines
    assert lines[-2] == "models 3.0 MB 20 days llm-1.0"
    assert left(cache) == EVERYTHING


@pytest.mark.parametrize(
    ("flags", "removed"),
    [
        (["--clear", "reference"], {"new.safetensors", "old.safetensors", "cut.safetensors"}),
        (["--clear", "reference", "--older-than", "5"], {"old.safetensors"}),
        (["--clear", "models"], {"llm-1.0"}),
        (["--clear", "all", "--older-than", "9.5"], {"old.safetensors", "llm-1.0"}),
        (["--clear", "all"], EVERYTHING),
    ],
)
def test_what_is_asked_for_is_removed(cache: Path, flags: list[str], removed: set[str], capsys: pytest.CaptureFixture):
    assert main(["cache", *flags]) == 0
    assert left(cache) == EVERYTHING - removed
    assert capsys.readouterr().out.splitlines()[-1].endswith(" removed")
    assert (cache / "llm_1.0.whl").exists(), "what the user put there is the user's"


def test_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "none"))
    assert main(["cache", "--clear", "all"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'none'}: 0 entries, 0.0 kB removed\n"


def test_mistakes(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    assert main(["cache", "--older-than", "3"]) == 2
    assert "--older-than: has no effect without --clear" in capsys.readouterr().err

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["cache", "--clear", "reference"]) == 2
    assert "can't be removed (Permission denied)" in capsys.readouterr().err


def test_sizes_and_ages_in_words():
    assert [size(n) for n in (0, 999_900, 1_000_000, 2_500_000_000)] == ["0.0 kB", "999.9 kB", "1.0 MB", "2.5 GB"]
    assert [age(days) for days in (0.1, 1.9, 2, 400)] == ["2 hours", "46 hours", "2 days", "400 days"]
