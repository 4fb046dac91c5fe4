"""Process reward models, trained for real: what is learned, what is measured, what is left, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trueup import reward
from trueup.cli.main import main
from trueup.errors import DataError, ModelError, SettingsError
from trueup.models.heads import load_reward_model
from trueup.models.load import load_model
from trueup.models.scorer import prepare_reward_scorer
from trueup.models.scratch import make_model
from trueup.models.tree import tree_batch
from trueup.records import Completion, CompletionGroup
from trueup.runs.folder import read_metrics
from trueup.trainers.process import check_steps, first, step_metrics, step_summary
from trueup.trainers.tally import Tally, Totals

TIMES = {"step_seconds", "tokens_per_second"}


def solutions(count: int, *, length: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Numbers modulo 5, of which each must be one or two more than the one before it, right or wrong; one in four is
    not. No solution comes twice."""
    draw, rows = random.Random(seed), {}
    while len(rows) < count:
        last = start = draw.randrange(5)
        steps, labels = [], []
        for _ in range(length):
            right = draw.random() > 0.25
            last = (last + draw.choice([1, 2] if right else [0, 3, 4])) % 5
            steps.append(str(last))
            labels.append(right)
        rows[start, *steps] = {"prompt": f"{start}\n", "steps": steps, "labels": labels}
    return list(rows.values())


def digit_sums(count: int, *, modulus: int = 3, length: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Running sums, digit by digit: ``+2=1`` behind a sum of 2 is right modulo 3. Three steps in ten are wrong."""
    draw, rows = random.Random(seed), {}
    while len(rows) < count:
        total = start = draw.randrange(modulus)
        steps, labels = [], []
        for _ in range(length):
            digit, right = draw.randrange(modulus), draw.random() > 0.3
            total = (total + digit + (0 if right else draw.randrange(1, modulus))) % modulus
            steps.append(f"+{digit}={total}")
            labels.append(right)
        rows[start, *steps] = {"prompt": f"{start}\n", "steps": steps, "labels": labels}
    return list(rows.values())


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "steps"
    return str(make_model(folder, characters="0123456789+=\n", hidden_size=32, num_layers=2, num_heads=4, seed=3))


def train(model: Any, data: Any, output: Any, **settings: Any) -> Any:
    defaults = {"process": True, "quiet": True, "batch_size": 16, "num_epochs": 2, "learning_rate": 3e-3}
    return reward(model=model, data=data, output=str(output), **(defaults | {"dtype": "float32"} | settings))


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


# --- learning


def learned(rows: list[dict[str, Any]], model: str, output: Path, **settings: Any) -> dict[str, float]:
    """What an evaluation says of every fifth row, after training on the others."""
    train_rows = [row for index, row in enumerate(rows) if index % 5]
    result = train(model, train_rows, output, eval_data=rows[::5], **settings)
    assert metrics(output)[0]["eval_balanced_accuracy_low"] < 0.6  # it did not know at first
    return {name.removeprefix("eval_"): value for name, value in result.metrics.items()}


def test_mistakes_are_found_in_solutions_that_were_never_seen(model: str, tmp_path: Path):
    settings = {"batch_size": 32, "num_epochs": 12, "learning_rate": 5e-3}
    found = learned(solutions(500), model, tmp_path / "run", **settings)
    assert found["accuracy"] > 0.98
    assert found["balanced_accuracy"] > 0.98
    assert found["first_mistake_found"] > 0.95
    assert found["faultless_passed"] > 0.9
    assert found["score_right"] > 2 > -2 > found["score_wrong"]
    assert 0.5 < found["right_steps"] < 0.8
    assert found["judged_steps"] == 4
    assert found["accuracy_low"] < found["accuracy"] <= found["accuracy_high"]


@pytest.mark.slow
def test_digit_sums_are_checked(tmp_path: Path):
    """Three numbers to look at for every step: the sum before, the digit, the sum after."""
    folder = make_model(tmp_path / "m", characters="0123456789+=\n", hidden_size=64, num_layers=2, num_heads=4, seed=3)
    found = learned(digit_sums(1500), str(folder), tmp_path / "run", num_epochs=10)
    assert found["balanced_accuracy"] > 0.99
    assert found["first_mistake_found"] > 0.99


def step(prompt: int, *tokens: int, labels: tuple[float, ...]) -> CompletionGroup:
    completion = Completion(
        tokens=np.array(tokens), step_ends=np.arange(len(tokens)), step_labels=np.array(labels, dtype=np.float32)
    )
    return CompletionGroup(prompt=np.array([prompt]), completions=(completion,))


@pytest.mark.parametrize("soft", [False, True])
def test_the_score_becomes_the_log_odds_of_right(model: str, tmp_path: Path, soft: bool):
    """All of a small population: steps of one token whose chance of being right, in eighths, depends on the prompt and
    on what came before. Trained on hard labels in these proportions, or on the chances, σ(score) is the chance."""
    cases = [(p, a, b) for p, a, b in itertools.product((4, 5), (6, 7), (8, 9))]
    eighths = {case: (1 + 2 * i % 7, 1 + (3 * i + 1) % 7) for i, case in enumerate(cases)}
    chances = {p: {a: [] for a in (6, 7)} for p in (4, 5)}
    for (p, a, _), (one, _) in eighths.items():
        chances[p][a].append(one / 8)
    if soft:
        groups = [step(p, a, b, labels=(x / 8, y / 8)) for (p, a, b), (x, y) in eighths.items()]
    else:
        groups = [
            step(p, a, b, labels=(float(i < x), float(i < y)))
            for (p, a, b), (x, y) in eighths.items()
            for i in range(8)
        ]
    full_batch = {"batch_size": len(groups), "num_epochs": 100, "tokens_per_batch": 9999, "learning_rate": 5e-3}
    result = train(model, groups, tmp_path / "run", **full_batch)
    scorer = prepare_reward_scorer(load_reward_model(result.model_folder, scores_each="step").model)
    with torch.no_grad():
        found = scorer(tree_batch([step(*case, labels=(0.0, 0.0)) for case in cases])).sigmoid().view(-1, 2)
    truth = torch.tensor([[np.mean(chances[p][a]), y / 8] for (p, a, _), (_, y) in eighths.items()])
    assert float((found - truth).abs().max()) < 0.02
    assert float(truth.std()) > 0.15


# --- invariance, resume, what is left


def test_micro_batches_and_shared_prompts_change_nothing(model: str, tmp_path: Path):
    rows = solutions(24)
    shared = [row | {"prompt": "1\n"} for row in rows]
    for name, data in (("own", rows), ("shared", shared)):
        runs = {}
        for tokens in (40, 10_000):
            train(model, data, tmp_path / f"{name}{tokens}", tokens_per_batch=tokens, holdout=0.3 * (name == "own"))
            runs[tokens] = metrics(tmp_path / f"{name}{tokens}")
        assert len(runs[40]) == len(runs[10_000])
        for small, big in zip(runs[40], runs[10_000], strict=True):
            for line in (small, big):  # prompts are shared as far as a pass goes
                line.pop("num_tokens", None)
            assert small == pytest.approx(big, rel=2e-4, abs=2e-5)


def test_resume_is_exact(model: str, tmp_path: Path):
    rows = solutions(24)
    settings = {"eval_data": rows[:5], "save_every": 1, "eval_every": 1, "batch_size": 8, "num_epochs": 1}
    train(model, rows, tmp_path / "run", **settings)
    whole = metrics(tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    newest.rmdir()
    train(model, rows, tmp_path / "run", resume="yes", **settings)
    assert metrics(tmp_path / "run") == whole


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_saved_model_scores_alike_in_transformers(model: str, tmp_path: Path, lora_rank: int):
    """What plain transformers gives for prompt and answer up to a step's end is the score of that step."""
    rows = solutions(16)
    result = train(model, rows, tmp_path / "run", num_epochs=1, lora_rank=lora_rank)
    plain = AutoModelForSequenceClassification.from_pretrained(result.model_folder)
    assert json.loads((result.model_folder / "config.json").read_text())["scores_each"] == "step"
    tokenizer = AutoTokenizer.from_pretrained(result.model_folder)
    loaded = load_reward_model(result.model_folder, scores_each="step", dtype="float32")
    (row,) = rows[:1]
    tokens = [tokenizer("".join([row["prompt"], "\n".join(row["steps"][:n])]))["input_ids"] for n in range(1, 5)]
    start = len(tokenizer(row["prompt"])["input_ids"])
    ends = np.array([len(each) - start - 1 for each in tokens])
    whole = Completion(tokens=np.array(tokens[-1][start:]), step_ends=ends)
    with torch.no_grad():
        theirs = torch.cat([plain(torch.tensor([each])).logits[0] for each in tokens])
        ours = prepare_reward_scorer(loaded.model)(
            tree_batch([CompletionGroup(prompt=np.array(tokens[-1][:start]), completions=(whole,))])
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_models_that_score_steps_and_models_that_score_answers_are_kept_apart(model: str, tmp_path: Path):
    rows, pairs = solutions(8), [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 8
    steps = train(model, rows, tmp_path / "steps", num_epochs=1, learning_rate=1e-4)
    answers = train(model, pairs, tmp_path / "answers", num_epochs=1, process=False)
    with pytest.raises(ModelError, match="scores each step, not each completion"):
        train(steps.model_folder, pairs, tmp_path / "no", process=False)
    with pytest.raises(ModelError, match="scores each completion, not each step"):
        train(answers.model_folder, rows, tmp_path / "neither")
    train(steps.model_folder, rows, tmp_path / "again", num_epochs=1)  # its head goes on as it is
    assert metrics(tmp_path / "again")[0]["loss"] < metrics(tmp_path / "steps")[0]["loss"]


def test_the_command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in solutions(8)))
    output = str(tmp_path / "run")
    given = ["reward", "--process", "--model", model, "--data", str(file), "--output", output, "--max-steps", "1"]
    assert main(given) == 0
    assert "format stepwise (detected), 8 rows; 8 kept" in capsys.readouterr().out
    assert main(["reward", "--model", model, "--data", str(file), "--output", output + "2"]) == 2
    told = capsys.readouterr().err
    assert "rows of the format 'stepwise', not preference data" in told
    assert "trueup reward --process" in told


def test_a_separator_of_one_s_own(model: str, tmp_path: Path):
    rows = solutions(8)
    train(model, rows, tmp_path / "run", num_epochs=1, step_separator="\n\n")
    prompts = {row["prompt"] for row in rows}  # computed once each
    assert metrics(tmp_path / "run")[-1]["num_tokens"] == 2 * len(prompts) + 8 * (4 + 3 * 2 + 1)


# --- metrics by hand


def test_metrics_by_hand():
    nan = math.nan
    labels = torch.tensor([[1.0, 0.0, 0.0, nan], [1.0, 0.75, nan, nan], [0.25, 0.5, 1.0, 1.0], [nan, nan, nan, nan]])
    scores = torch.tensor(
        [[2.0, -1.0, 3.0, -9.0], [1.0, -4.0, nan, nan], [0.0, -7.0, -1.0, 5.0], [1.0, -1.0, nan, nan]]
    )
    found = {name: values.tolist() for name, values in step_metrics(scores, labels).items()}
    assert found == {
        "accuracy": [1, 1, 0, 1, 0, 0.5, 0, 1],  # a step labelled ½ is neither right nor wrong
        "accuracy_right": [1, 1, 0, 0, 1],
        "accuracy_wrong": [1, 0, 0.5],
        "score_right": [2, 1, -4, -1, 5],
        "score_wrong": [-1, 3, 0],
        "first_mistake_found": [1, 0],  # the third answer's first mistake is not called one
        "faultless_passed": [0],
        "right_steps": [1, 0, 0, 1, 1, 0, 1, 1],
        "judged_steps": [3, 2, 3, 0],
    }
    assert first(torch.tensor([[False, True, True], [False, False, False]])).tolist() == [1, 3]


def test_a_model_that_praises_everything_is_told_apart():
    """Nine steps in ten are right: so is that model, and its balanced accuracy is a half."""
    labels = (torch.arange(200) % 10 > 0).float().view(20, 10)
    tally = Tally()
    tally.add(torch.tensor(0.0), step_metrics(torch.ones(20, 10), labels), tokens=1)
    told = step_summary(tally).figures
    assert told["accuracy"] == pytest.approx(0.9)
    assert told["balanced_accuracy"] == 0.5
    assert told["balanced_accuracy_low"] < 0.5 < told["balanced_accuracy_high"]
    assert told["first_mistake_found"] == 0
    assert "faultless_passed" not in told  # there is none


def test_steps_of_one_answer_are_not_independent():
    """The same outcomes, in answers of ten steps that are all right or all wrong called, say less than alone."""
    scores = torch.where(torch.arange(20) % 5 > 0, 1.0, -1.0)
    intervals = []
    for rows in (scores.repeat_interleave(10).view(20, 10), scores.repeat(10).view(200, 1)):
        tally = Tally()
        tally.add(torch.tensor(0.0), step_metrics(rows, torch.ones_like(rows)), tokens=1)
        told = step_summary(tally).figures
        assert told["accuracy"] == pytest.approx(0.8)
        assert "balanced_accuracy" not in told  # no step is wrong
        intervals.append(told["accuracy_high"] - told["accuracy_low"])
    assert intervals[0] > 2.5 * intervals[1]


def test_an_evaluation_of_a_broken_model_says_nan():
    tally = Tally()
    tally.add(torch.tensor(math.nan), step_metrics(torch.full((2, 2), math.nan), torch.ones(2, 2)), tokens=1)
    told = step_summary(tally).figures
    assert math.isnan(told["accuracy"])
    assert math.isnan(told["faultless_passed"])


def test_totals_count_labelled_steps():
    labelled = step(4, 5, 6, 7, labels=(1.0, math.nan, 0.0))
    assert Totals.of([labelled, labelled]).steps == 4


# --- faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_ends": None}, "not labelled step by step"),
        ({"step_labels": None}, "not labelled step by step"),
        ({"step_labels": np.array([1.0])}, "2 steps but 1 labels"),
        ({"step_ends": np.array([1, 1])}, "must ascend and stay inside"),
        ({"step_ends": np.array([-1, 1])}, "must ascend and stay inside"),
        ({"step_ends": np.array([0, 2])}, "must ascend and stay inside"),
        ({"step_labels": np.array([1.0, -1.0])}, "between 0 and 1"),
        ({"step_labels": np.array([1.0, math.inf])}, "between 0 and 1"),
        ({"step_labels": np.array([math.nan, math.nan])}, "not all be NaN"),
        ({"step_ends": np.array([], dtype=np.int64), "step_labels": np.array([])}, "not all be NaN"),
    ],
)
def test_groups_whose_steps_can_t_be_trained_on(model: str, tmp_path: Path, change: dict, message: str):
    good = step(4, 5, 6, labels=(1.0, 0.0))
    bad = dataclasses.replace(good.completions[0], **change)
    group = dataclasses.replace(good, completions=(*good.completions, bad), where="here")
    check_steps(good)
    with pytest.raises(DataError, match=rf"here: .*{message}(.|\n)*→"):
        train(model, [group], tmp_path / "run")


def test_an_answer_to_compare_has_no_steps(model: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"'explicit', not process data\n.*trueup reward or trueup preference"):
        train(model, [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}], tmp_path / "run")
    with pytest.raises(DataError, match="no row is left to train on"):
        train(model, [{"prompt": "1\n", "steps": ["1"], "labels": [None]}], tmp_path / "run2")


@pytest.mark.parametrize(
    "settings",
    [{"centering_coef": 0.1, "process": True}, {"use_margin": False, "process": True}, {"step_separator": " "}],
)
def test_settings_that_mean_nothing_are_refused(model: str, settings: dict[str, Any], tmp_path: Path):
    flag = next(iter(settings)).replace("_", "-")
    with pytest.raises(SettingsError, match=f"--{flag}: has no effect without"):
        train(model, solutions(1), tmp_path, **({"process": False} | settings))


def test_a_model_object_is_trained(model: str, tmp_path: Path):
    loaded = load_model(model)
    result = train(loaded.model, solutions(8), tmp_path / "run", tokenizer=loaded.tokenizer, num_epochs=1, dtype="auto")
    assert result.metrics["loss"] > 0
    assert not hasattr(loaded.model.config, "scores_each")  # its trunk was copied
