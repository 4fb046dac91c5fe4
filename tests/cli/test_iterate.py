"""Policy and reward model in turn, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trueup import reward
from trueup.cli.iterate import IterateSettings, iterate, with_replay
from trueup.errors import SettingsError
from trueup.models.scratch import make_model
from trueup.runs.folder import read_metrics


@pytest.fixture
def start(tmp_path: Path) -> dict:
    """A model, a reward model, prompts, and somebody who likes long answers."""
    model = make_model(
        tmp_path / "model", characters="abc?", hidden_size=16, num_layers=1, num_heads=2, initializer_range=0.02
    )
    pairs = [{"prompt": "a?", "chosen": "abc", "rejected": "b"}, {"prompt": "b?", "chosen": "cab", "rejected": "a"}]
    judge = reward(
        model=str(model), data=pairs, output=str(tmp_path / "judge"), quiet=True, dtype="float32", max_steps=1
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{x}{y}?"}) + "\n" for x in "abc" for y in "abc"))
    labels = tmp_path / "labels.py"
    labels.write_text("def long(completions, **columns):\n    return [float(len(each)) for each in completions]\n")
    return {
        "model": str(model),
        "reward": (str(judge.folder),),
        "labels": (f"{labels}:long",),
        "data": (str(prompts),),
        "output": str(tmp_path / "iterate"),
        "max_new_tokens": 4,
        "group_size": 4,
        "batch_size": 4,
        "max_steps": 2,
        "kl_coef": 0.1,
        "reward_steps": 2,
        "reward_batch_size": 4,
        "iterations": 2,
        "dtype": "float32",
        "quiet": True,
    }


def test_each_iteration_starts_where_the_one_before_it_ended(start: dict, capsys):
    iterate(IterateSettings(**start))
    output = Path(start["output"])
    first, second = (output / f"iteration-{number}" for number in (1, 2))
    told = (second / "policy" / "config.yaml").read_text()
    assert f"model: {first / 'policy' / 'checkpoints' / 'step-000002' / 'model'}" in told
    assert str(first / "reward" / "checkpoints" / "step-000002" / "model") in told
    pairs = [json.loads(line) for line in (first / "pairs.jsonl").open()]
    assert pairs
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in pairs)
    assert not (second / "pairs.jsonl").exists(), "nobody would learn from them"
    # A second call finds everything done, and changes nothing.
    before = (second / "policy" / "metrics.jsonl").read_bytes()
    iterate(IterateSettings(**(start | {"resume": "auto"})))
    assert (second / "policy" / "metrics.jsonl").read_bytes() == before
    # The second run's reference is its own start: the first step knows no KL.
    records = [line for line in read_metrics(second / "policy" / "metrics.jsonl") if "objective/kl" in line]
    assert abs(records[0]["objective/kl"]) < 1e-5


def test_replay_is_a_share_of_the_whole(tmp_path: Path):
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl"
    new.write_text("".join(f'{{"n": {i}}}\n' for i in range(90)))
    old.write_text("".join(f'{{"o": {i}}}\n' for i in range(50)))
    rows = [json.loads(line) for line in with_replay(new, [old], tmp_path / "both.jsonl", 0.1).open()]
    assert sum("n" in row for row in rows) == 90
    assert [row["o"] for row in rows if "o" in row] == list(range(0, 50, 5))
    assert len(with_replay(new, [], tmp_path / "first.jsonl", 0.1).read_text().splitlines()) == 90


def test_labels_are_needed(start: dict):
    with pytest.raises(SettingsError, match="retrained"):
        iterate(IterateSettings(**(start | {"labels": ()})))
