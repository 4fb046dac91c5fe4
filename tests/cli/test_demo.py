"""The demo's problems, and the demo itself in small."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trueup.cli.demo import DemoSettings, Problem, demo, problems


def test_problems_by_hand():
    assert (Problem(47, 75).right, Problem(47, 75).wrong) == ("122", "112")
    assert (Problem(11, 22).right, Problem(11, 22).wrong) == ("33", "43")
    assert Problem(99, 99).carry_forgotten == "188"


def test_train_and_held_out_share_nothing():
    train, held_out = problems(seed=0)
    assert len(train) == 9500
    assert len(set(train + held_out)) == 10_000
    assert problems(seed=1)[1] != held_out


def test_the_demo_in_small(tmp_path: Path, capsys, monkeypatch):
    folder = tmp_path / "demo"
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    demo(DemoSettings(output=str(folder), sft_steps=3, reward_steps=2, dpo_steps=2, quiet=True))
    printed = capsys.readouterr().out
    for stage in ("untrained", "supervised fine-tuning", "reward model", "DPO", "DPO with likelihood"):
        assert stage in printed
    demonstrations = [json.loads(line) for line in (folder / "data" / "demonstrations.jsonl").open()]
    right = [row["completion"] == str(eval(row["prompt"].rstrip("="))) for row in demonstrations]
    assert 0.70 < sum(right) / len(right) < 0.76  # 45 % of the sums carry, 60 % of those are spoilt
    for run in ("sft", "reward", "dpo", "rpo"):
        assert list((folder / run / "checkpoints").glob("step-*/model/model.safetensors"))
    assert not (tmp_path / "cache").exists(), "the user's cache is left alone"
    (known,) = (folder / "cache" / "reference").iterdir()
    assert known.suffix == ".safetensors"  # one for both stages that compare with the same reference
    assert os.environ["TRUEUP_CACHE"] == str(tmp_path / "cache")
