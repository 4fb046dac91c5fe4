"""The page on agents names every setting, and every number that a run writes."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from trueup.control.presets import preset
from trueup.control.settings import ControlSettings
from trueup.control.train import train
from trueup.runs.folder import read_metrics

PAGE = (Path(__file__).resolve().parents[2] / "docs/control.md").read_text(encoding="utf-8")


def table(heading: str) -> set[str]:
    """What stands in backticks in a section's rows."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return {name for row in re.findall(r"^\|.*$", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def test_every_setting_is_on_the_page() -> None:
    assert {field.name for field in fields(ControlSettings)} <= table("Settings")


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_every_metric_is_on_the_page(algorithm: str, tmp_path: Path) -> None:
    changes = {"surrogate": "adaptive_kl"} if algorithm == "ppo" else {"learning_starts": 100, "log_every": 1}
    chosen = preset(algorithm, "CartPole-v1") | changes
    chosen |= {"total_steps": 1024, "eval_episodes": 1, "quiet": True, "output": str(tmp_path / "run")}
    train(ControlSettings(env="CartPole-v1", algorithm=algorithm, **chosen))  # type: ignore[arg-type]
    written = {name for line in read_metrics(tmp_path / "run/metrics.jsonl") for name in line}
    assert written <= table("Metrics")
