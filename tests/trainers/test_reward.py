"""What a reward model's evaluations say: calibration, its tables, and intervals that count lists."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trueup import reward
from trueup.records import Completion, CompletionGroup
from trueup.rewards.reward_model import RewardModel
from trueup.runs.folder import read_lines, read_metrics
from trueup.runs.statistics import accuracy_metrics, calibration_metrics, comparison_tables, pair_outcomes
from trueup.trainers.session import Session
from trueup.trainers.summary import compared_pairs
from trueup.trainers.tally import Tally

LISTS = [{"prompt": f"{a}+1=", "completions": [str(a + 1), "33", f"{a}", f"{a}7"][: 2 + a % 3]} for a in range(1, 8)]
SETTINGS: dict[str, Any] = {"quiet": True, "batch_size": 4, "learning_rate": 1e-2, "dtype": "float32"}


def evaluations(folder: str | Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(Path(folder) / "metrics.jsonl") if "eval_loss" in line]


@pytest.mark.parametrize("tokens_per_batch", [20, 4096])
def test_an_evaluation_says_what_the_saved_model_s_scores_say(tiny_model, output, tokens_per_batch):
    result = reward(
        model=tiny_model, data=LISTS, eval_data=LISTS, output=output, tokens_per_batch=tokens_per_batch, **SETTINGS
    )
    model = RewardModel.load(result.model_folder, dtype="float32")
    gaps, lengths, lists = [], [], []
    for number, row in enumerate(LISTS):
        texts = row["completions"]
        scores = model.score(row["prompt"], texts)
        for i in range(len(texts)):
            for j in range(i + 1, len(texts)):
                gaps.append(scores[i] - scores[j])
                lengths.append(len(texts[i]) - len(texts[j]))
                lists.append(number)
    last = evaluations(output)[-1]
    expected = accuracy_metrics(pair_outcomes(gaps), lengths, lists) | calibration_metrics(gaps, lists)
    assert {name: last[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-4)

    tables = read_lines(Path(output) / "calibration.jsonl")
    assert [line["step"] for line in tables] == [line["step"] for line in evaluations(output)]
    for name, table in comparison_tables(gaps, lengths, lists).items():
        assert len(tables[-1][name]) == len(table)
        for found, row in zip(tables[-1][name], table, strict=True):
            assert found == pytest.approx(row, abs=1e-4)


def test_two_answers_a_row_have_the_loss_as_log_loss(tiny_model, pairs, output):
    reward(model=tiny_model, data=pairs, eval_data=pairs, output=output, max_steps=3, **SETTINGS)
    for line in evaluations(output):
        assert line["eval_log_loss"] == pytest.approx(line["eval_loss"], abs=1e-5)
    assert evaluations(output)[0]["eval_log_loss"] == pytest.approx(math.log(2), abs=0.05)


def test_a_resumed_run_writes_the_same_tables(tiny_model, pairs, tmp_path, monkeypatch):
    settings = {"data": pairs, "holdout": 0.4, "eval_every": 1, "save_every": 2, "max_steps": 4, **SETTINGS}
    reward(model=tiny_model, output=str(tmp_path / "whole"), **settings)
    save = Session.save

    def die_at_step_4(self: Session, step: int, *args: Any) -> None:
        if step == 4:
            raise RuntimeError("the machine went away")
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", die_at_step_4)
        with pytest.raises(RuntimeError, match="went away"):
            reward(model=tiny_model, output=str(tmp_path / "died"), **settings)
    reward(model=tiny_model, output=str(tmp_path / "died"), resume="auto", **settings)
    whole, died = (tmp_path / name / "calibration.jsonl" for name in ("whole", "died"))
    assert [line["step"] for line in read_lines(whole)] == [0, 1, 2, 3, 4]
    assert died.read_bytes() == whole.read_bytes()


def test_pairs_know_their_list_across_micro_batches():
    """Lists of three and of two in one micro-batch, a demonstration and a list of two in the next."""
    tokens = np.array([4, 5])

    def group(size: int) -> CompletionGroup:
        return CompletionGroup(prompt=tokens, completions=(Completion(tokens=tokens),) * size)

    tally = Tally()
    for groups, values in (([group(3), group(2)], [1.0, 1.0, 1.0, 0.0]), ([group(1), group(2)], [0.0])):
        metrics = {"accuracy": torch.tensor(values), "length_gap": torch.zeros(len(values))}
        tally.add(torch.tensor(0.1), metrics, tokens=9, groups=groups)
    assert tally.lists().tolist() == [0, 0, 0, 1, 3]
    found = compared_pairs(tally, "accuracy").figures
    expected = accuracy_metrics([1, 1, 1, 0, 0], [0] * 5, [0, 0, 0, 1, 3])
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    naive = accuracy_metrics([1, 1, 1, 0, 0], [0] * 5)
    assert found["accuracy_high"] > naive["accuracy_high"]
