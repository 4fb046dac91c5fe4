"""The demo's problems, and the demo itself in small."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from trueup.cli.demo import POLICIES, DemoSettings, demo
from trueup.cli.sums import Problem, problems
from trueup.runs.statistics import accuracy_interval


def test_problems_by_hand():
    assert (Problem(47, 75).right, Problem(47, 75).carry_forgotten) == ("122", "12")
    assert (Problem(11, 22).right, Problem(11, 22).carry_forgotten) == ("33", "33")
    assert Problem(99, 99).carry_forgotten == "88"


def test_train_and_held_out_share_nothing():
    train, held_out = problems(seed=0)
    assert (len(train), len(held_out)) == (9000, 1000)
    assert len(set(train + held_out)) == 10_000
    assert problems(seed=1)[1] != held_out


def test_the_demo_in_small(tmp_path: Path, capsys, monkeypatch):
    folder = tmp_path / "demo"
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    short = {"sft_steps": 60, "reward_steps": 2, "dpo_steps": 2, "ppo_steps": 2, "rl_steps": 2}
    demo(DemoSettings(output=str(folder), quiet=True, **short))
    printed = capsys.readouterr().out
    for stage in (*POLICIES, "reward model", "which is better?"):
        assert stage in printed
    demonstrations = [json.loads(line) for line in (folder / "data" / "demonstrations.jsonl").open()]
    right = [row["completion"] == str(eval(row["prompt"].rstrip("="))) for row in demonstrations]
    assert 0.48 < sum(right) / len(right) < 0.54  # 30 % of the sums carry nothing, and 70 % of the others are spoilt
    for run in ("sft", "reward", "dpo", "ppo", "grpo", "reinforce"):
        assert list((folder / run / "checkpoints").glob("step-*/model/model.safetensors"))
    assert not (tmp_path / "cache").exists(), "the user's cache is left alone"
    assert len(list((folder / "cache" / "reference").iterdir())) == 1
    assert os.environ["TRUEUP_CACHE"] == str(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_every_method_beats_sft(seed: int, tmp_path: Path):
    """Outside of the intervals: the lower end of each is above the upper end of SFT's."""
    policies = demo(DemoSettings(output=str(tmp_path / "demo"), seed=seed, quiet=True))
    intervals = {name: accuracy_interval(policy.right) for name, policy in policies.items()}
    _, _, most_of_sft = intervals["supervised fine-tuning"]
    for name in POLICIES[2:]:
        accuracy, low, high = intervals[name]
        assert low > most_of_sft, f"{name}: {accuracy:.1%} ({low:.1%}–{high:.1%}), SFT at most {most_of_sft:.1%}"
