"""``trueup control``: train, eval and watch as a user types them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trueup.cli.main import main
from trueup.runs.settings import values_from_yaml

SHORT = ["--total-steps", "512", "--num-envs", "2", "--rollout-steps", "64", "--num-epochs", "2", "--quiet"]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds a run in runs/."""
    monkeypatch.chdir(tmp_path)
    assert main(["control", "train", "CartPole-v1", "--seeds", "1", "2", "--eval-episodes", "3", *SHORT]) == 0
    return tmp_path


def test_train_eval_watch(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["control", "eval", "CartPole-v1", "--episodes", "5", "--quiet"]) == 0
    table = capsys.readouterr().out
    assert "agent of runs/ppo-CartPole" in table
    rows = [line.split() for line in table.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2"]
    for row in rows:
        mean, lowest, highest, length = (float(row[index]) for index in (1, 4, 5, 6))
        assert lowest <= mean <= highest
        assert mean == length  # CartPole pays 1 for each step
    for name in ("video.gif", "video.mp4"):
        assert (
            main(["control", "watch", "runs/ppo-CartPole", "--agent", "2", "--output", name, "--max-steps", "9"]) == 0
        )
    shown = capsys.readouterr().out
    assert "return 9.0 in 9 steps" in shown
    assert (trained / "video.gif").read_bytes()[:4] == b"GIF8"
    assert b"ftyp" in (trained / "video.mp4").read_bytes()[:16]
    import imageio.v2 as imageio

    frames = imageio.mimread(trained / "video.gif")
    assert len(frames) >= 5  # equal ones are shown longer
    assert any(not np.array_equal(frames[0], frame) for frame in frames[1:])
    assert not list(trained.glob(".*part*"))


def test_the_preset_is_the_default(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = values_from_yaml((trained / "runs/ppo-CartPole/config.yaml").read_text())
    assert config["gamma"] == "0.98"  # the preset's
    assert config["num_envs"] == "2"  # the flag's
    with pytest.raises(SystemExit):
        main(["control", "train", "LunarLander-v3", "--help"])
    assert "0.999" in capsys.readouterr().out


def test_a_run_goes_on_from_its_own_settings(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["control", "train", "--config", "runs/ppo-CartPole/config.yaml"]) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main(["control", "train", "--config", "runs/ppo-CartPole/config.yaml", "--resume", "auto"]) == 0
    output = capsys.readouterr().out
    assert "run runs/ppo-CartPole, agent runs/ppo-CartPole/checkpoints/step-000512/model" in output
    assert "95 % interval over 2 seeds" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "which environment"),
        (["train", "Nope-v1"], "Nope"),
        (["train", "Pendulum-v1", "--algorithm", "dqn"], "Discrete"),
        (["train", "CartPole-v1", "--kl-target", "0.1"], "--kl-target"),
        (["eval"], "which agent"),
        (["eval", "Acrobot-v1"], "trueup control train Acrobot-v1"),
        (["watch", "CartPole-v1", "--output", "video.avi"], ".mp4 or .gif"),
        (["watch", "CartPole-v1", "--agent", "7"], "one of 1, 2"),
        (["eval", "CartPole-v1", "--env", "Acrobot-v1"], "4 numbers, Acrobot-v1 shows 6"),
    ],
)
def test_mistakes(trained: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["control", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_agent_is_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = (trained / "runs/ppo-CartPole/checkpoints").iterdir()
    (checkpoint / "model" / "agent.json").write_text("{}")
    assert main(["control", "eval", "CartPole-v1"]) == 2
    assert "agent.json" in capsys.readouterr().err
    (checkpoint / "manifest.json").unlink()
    assert main(["control", "eval", str(checkpoint / "model")]) == 2
    assert "no agent can be read here" in capsys.readouterr().err
