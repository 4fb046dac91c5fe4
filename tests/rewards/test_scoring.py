"""Files of scores: what stands in them, exact resume wherever a run stopped, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trueup.data.formats import read_examples
from trueup.data.report import ReadReport
from trueup.data.settings import TokenizeSettings
from trueup.errors import CheckpointError, DataError, NonFiniteError, SettingsError
from trueup.models.heads import load_reward_model
from trueup.rewards import scoring
from trueup.rewards.ensembles import mean_minus_std, worst_case
from trueup.rewards.reward_model import RewardModel
from trueup.rewards.scoring import score_data
from trueup.runs.statistics import accuracy_interval, calibration_metrics

LISTS = [
    {"prompt": f"{a}+1=", "completions": [str(a + 1), "it is more", f"{a}", f"{a} and one"][: 2 + a % 3]}
    for a in range(1, 8)
]


@pytest.fixture(scope="module")
def models(reward_models) -> list[RewardModel]:
    return [RewardModel.load(name, dtype="float32") for name in reward_models]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(scoring, "ROWS_PER_PART", 4)


def lines_of(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_what_stands_in_a_line(models, pairs, tmp_path):
    scored = score_data(models[:1], pairs, tmp_path / "scores.jsonl", quiet=True)
    lines = lines_of(scored.path)
    assert [line["row"] for line in lines] == list(range(len(pairs)))
    for line, row in zip(lines, pairs, strict=True):
        assert set(line) == {"row", "where", "prompt", "completions", "scores", "lengths"}
        assert (line["prompt"], line["completions"]) == (row["prompt"], [row["chosen"], row["rejected"]])
        assert line["lengths"] == [len(text) + 1 for text in line["completions"]]  # characters, and the end token
        assert line["scores"] == pytest.approx(models[0].score(line["prompt"], line["completions"]), abs=1e-5)


def test_the_figures_are_those_of_the_lines(models, tmp_path):
    """Lists of two, three and four: all pairs of the ranking, and intervals that count lists."""
    scored = score_data(models[:1], LISTS, tmp_path / "scores.jsonl", quiet=True)
    gaps, rows = [], []
    for number, line in enumerate(lines_of(scored.path)):
        for i, better in enumerate(line["scores"]):
            gaps += [better - worse for worse in line["scores"][i + 1 :]]
            rows += [number] * (len(line["scores"]) - i - 1)
    outcomes = [float(gap > 0) for gap in gaps]
    metrics = scored.metrics
    assert (metrics["num_rows"], metrics["num_completions"]) == (7, sum(len(row["completions"]) for row in LISTS))
    assert (metrics["accuracy"], metrics["accuracy_low"], metrics["accuracy_high"]) == pytest.approx(
        accuracy_interval(outcomes, lists=rows)
    )
    for name, value in calibration_metrics(gaps, rows).items():
        assert metrics[name] == pytest.approx(value)
    every = np.concatenate([line["scores"] for line in lines_of(scored.path)])
    assert (metrics["score_mean"], metrics["score_std"]) == pytest.approx((every.mean(), every.std()))
    for table in scored.tables.values():
        assert sum(row["count"] for row in table) == len(gaps)


def test_demonstrations_have_scores_and_nothing_to_compare(models, tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "", "completion": "no prompt"}]
    scored = score_data(models[:1], rows, tmp_path / "scores.jsonl", quiet=True)
    assert set(scored.metrics) == {"num_rows", "num_completions", "score_mean", "score_std"}
    assert scored.tables == {}


def test_the_file_is_a_ranking_by_the_model(models, tmp_path):
    scored = score_data(models[:1], LISTS, tmp_path / "scores.jsonl", quiet=True)
    report = ReadReport()
    examples = list(read_examples(scored.path, task="preference", report=report))
    assert report.format == "ranked"
    for example, line in zip(examples, lines_of(scored.path), strict=True):
        best_first = sorted(zip(line["scores"], line["completions"], strict=True), reverse=True)
        assert list(example.completions) == [text for _, text in best_first]


@pytest.mark.parametrize("aggregate", [worst_case, partial(mean_minus_std, coef=0.5)])
def test_several_models_each_read_the_text_themselves(models, pairs, tmp_path, aggregate):
    """Three vocabularies, two architectures; the line holds each model's scores and one made of them."""
    scored = score_data(models, pairs, tmp_path / "scores.jsonl", aggregate=aggregate, quiet=True)
    files = [score_data([model], pairs, tmp_path / f"{i}.jsonl", quiet=True).path for i, model in enumerate(models)]
    alone = [lines_of(path) for path in files]
    for line, *others in zip(lines_of(scored.path), *alone, strict=True):
        expected = np.array([other["scores"] for other in others])
        assert np.array(line["model_scores"]) == pytest.approx(expected, abs=1e-5)
        assert line["scores"] == pytest.approx(aggregate(expected).tolist(), abs=1e-5)
        assert line["std"] == pytest.approx(expected.std(0).tolist(), abs=1e-5)
    for index, lines in enumerate(alone, start=1):
        right = [float(line["scores"][0] > line["scores"][1]) for line in lines]
        assert scored.metrics[f"accuracy/model_{index}"] == pytest.approx(np.mean(right))


def test_a_row_that_one_model_can_t_read_is_left_out(models, pairs, tmp_path):
    short = replace(models[1], settings=TokenizeSettings(max_length=12))
    rows = [*pairs[:3], {"prompt": "1" * 40, "chosen": "2", "rejected": "3"}, *pairs[3:]]
    scored = score_data([models[0], short, short], rows, tmp_path / "scores.jsonl", quiet=True)
    assert [line["row"] for line in lines_of(scored.path)] == [i for i in range(len(rows)) if i != 3]
    assert scored.report.dropped == {"prompt longer than 11 tokens": 1}


# --- stopping and going on


@pytest.mark.parametrize("num_models", [1, 2])
def test_a_file_cut_anywhere_is_completed_to_the_bit(models, pairs, tmp_path, num_models):
    output = tmp_path / "scores.jsonl"
    score = partial(score_data, models[:num_models], pairs, output, quiet=True)
    whole = score()
    content = output.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    cuts = {0, 3, ends[0], ends[3], ends[3] + 5, ends[4], ends[-2], ends[-1] - 1, len(content)}
    for cut in sorted(cuts):
        output.write_bytes(content[:cut])
        again = score(resume="yes")
        assert output.read_bytes() == content, cut
        assert again.metrics == whole.metrics
    output.unlink()
    score(resume="auto")
    assert output.read_bytes() == content


def test_an_interrupt_leaves_whole_lines(models, pairs, tmp_path, monkeypatch):
    whole = score_data(models[:1], pairs, tmp_path / "whole.jsonl", quiet=True)
    output, score_part = tmp_path / "scores.jsonl", scoring.score_part

    def interrupted_at_row_8(models, examples, first, *rest):
        if first == 8:
            raise KeyboardInterrupt
        return score_part(models, examples, first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_part", interrupted_at_row_8)
        with pytest.raises(KeyboardInterrupt):
            score_data(models[:1], pairs, output, quiet=True)
    assert [line["row"] for line in lines_of(output)] == list(range(8))
    again = score_data(models[:1], pairs, output, resume="auto", quiet=True)
    assert output.read_bytes() == whole.path.read_bytes()
    assert again.metrics == whole.metrics


def test_progress_says_how_far_it_is(models, pairs, tmp_path, capsys):
    score_data(models[:1], pairs, tmp_path / "scores.jsonl")
    told = capsys.readouterr().out
    assert f"{len(pairs)}/{len(pairs)}" in told
    assert "left" in told


# --- mistakes


def test_a_file_that_is_there_is_not_overwritten(models, pairs, tmp_path):
    output = tmp_path / "scores.jsonl"
    score_data(models[:1], pairs, output, quiet=True)
    content = output.read_bytes()
    with pytest.raises(SettingsError, match="already") as caught:
        score_data(models[:1], pairs, output, quiet=True)
    assert "--resume auto" in str(caught.value)
    assert output.read_bytes() == content
    with pytest.raises(CheckpointError, match="nothing to go on with"):
        score_data(models[:1], pairs, tmp_path / "none.jsonl", resume="yes", quiet=True)


@pytest.mark.parametrize(
    "content",
    ['{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "notes", "one line\n", '{"row": 0}\n', "[1]\n", '{"ro"x'],
)
def test_a_file_of_something_else_stays_as_it_is(models, pairs, tmp_path, content):
    output = tmp_path / "mine.jsonl"
    output.write_text(content)
    with pytest.raises(CheckpointError, match=r"mine.jsonl:1: not a line of scores"):
        score_data(models[:1], pairs, output, resume="auto", quiet=True)
    assert output.read_text() == content


def test_other_data_and_other_models_are_noticed(models, pairs, tmp_path):
    output = tmp_path / "scores.jsonl"
    score_data(models[:1], pairs[:6], output, quiet=True)
    content = output.read_bytes()
    with pytest.raises(CheckpointError, match="row 0 of the data is another one"):
        score_data(models[:1], pairs[1:], output, resume="auto", quiet=True)
    with pytest.raises(CheckpointError, match="row 5 of the data is another one"):
        score_data(models[:1], pairs[:5], output, resume="auto", quiet=True)
    short = replace(models[0], settings=TokenizeSettings(max_length=8, overlong_completion="drop"))
    for others in (models[1:2], models[:2], [short]):
        with pytest.raises(CheckpointError, match="not those of the models and settings"):
            score_data(others, pairs, output, resume="auto", quiet=True)
    assert output.read_bytes() == content
    assert score_data(models[:1], pairs, output, resume="auto", quiet=True).metrics["num_rows"] == len(pairs)


def test_a_score_that_is_no_number_stops_and_names_the_row(reward_models, pairs, tmp_path):
    loaded = load_reward_model(reward_models[0], dtype="float32")
    broken = RewardModel.load(loaded)
    torch.nn.init.constant_(loaded.model.score.weight, torch.inf)
    with pytest.raises(NonFiniteError, match="row 1: the score that"):
        score_data([broken], pairs, tmp_path / "scores.jsonl", quiet=True)
    assert not (tmp_path / "scores.jsonl").exists()


def test_no_rows(models, tmp_path):
    file = tmp_path / "same.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    with pytest.raises(DataError, match=r"no row to score.*identical sides"):
        score_data(models[:1], str(file), tmp_path / "scores.jsonl", quiet=True)


def test_a_folder_that_can_t_be_written_is_told(models, pairs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        score_data(models[:1], pairs, tmp_path / "file" / "scores.jsonl", quiet=True)
