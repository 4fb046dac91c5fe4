"""The lines that sampling writes: to JSON and back."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import numpy as np
import pytest

from trueup.data.formats import read_examples
from trueup.data.prompts import PromptRow, read_prompts
from trueup.data.report import ReadReport
from trueup.data.sampled import SampledRow, plain_json, read_sampled, sampled_line
from trueup.errors import DataError
from trueup.records import Completion, CompletionGroup, StopReason

ASKED = ({"role": "user", "content": "2+2?"},)
SAID = ({"role": "assistant", "content": "4"},)


def read(*rows: Any, scores_column: str | None = None) -> list[SampledRow]:
    return list(read_sampled(list(rows), report=ReadReport(), scores_column=scores_column))


def completion(tokens: list[int], reason: StopReason) -> Completion:
    logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32) / 4
    return Completion(
        tokens=np.array(tokens), stop_reason=reason, sampler_logprobs=logprobs, untempered_logprobs=2 * logprobs
    )


def test_a_line_comes_back_as_it_was():
    columns = {"answer": 4, "completions": "a name that lines use too", "scores": [1, 2, 3]}
    row = PromptRow(prompt=ASKED, columns=columns, where="data.jsonl:3")
    group = CompletionGroup(
        prompt=np.array([1, 2]), completions=(completion([5, 6], StopReason.END), completion([7], StopReason.LENGTH))
    )
    line = json.loads(json.dumps(sampled_line(12, row, group, [SAID, SAID])))
    assert line["request"] == 12
    assert line["where"] == "data.jsonl:3"
    assert line["lengths"] == [2, 1]
    assert line["sampler_logprobs"] == [-0.75, -0.25]
    assert line["untempered_logprobs"] == [-1.5, -0.5]
    (back,) = read(line)
    assert (back.prompt, back.completions, back.columns) == (ASKED, (SAID, SAID), columns)
    assert back.stop_reasons == (StopReason.END, StopReason.LENGTH)
    assert back.completion_ids is not None
    assert [ids.tolist() for ids in back.completion_ids] == [[5, 6], [7]]
    (prompt,) = read_prompts([line], report=ReadReport())  # a file of samples is a file of prompts
    assert prompt.prompt == ASKED


def test_samples_are_no_ranked_list():
    line = {"prompt": "2+2=", "completions": ["5", "4"], "stop_reasons": ["end", "end"]}
    with pytest.raises(DataError, match="rows of the format 'sampled', not preference data") as raised:
        list(read_examples([line], task="preference", report=ReadReport()))
    assert "trueup pairs" in str(raised.value)
    (example,) = read_examples([line | {"scores": [0, 1]}], task="preference", report=ReadReport())
    assert example.completions == ("4", "5")


def test_other_files_of_scored_completions():
    row = {"question": "2+2=", "completions": ["5", "4"], "marks": ["0", 1], "answer": "4"}
    (found,) = read(row, scores_column="marks")
    assert found == SampledRow(
        prompt="2+2=", completions=("5", "4"), columns={"answer": "4"}, where="row 1", scores=(0.0, 1.0)
    )
    (mixed,) = read({"prompt": "2+2?", "completions": [list(SAID), "5"]})
    assert (mixed.prompt, mixed.completions) == (ASKED, (SAID, ({"role": "assistant", "content": "5"},)))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a"}, "the column 'completions' is missing"),
        ({"prompt": "a", "completions": "b"}, "'completions' must be a list"),
        ({"prompt": "a", "completions": [1]}, r"'completions\[0\]' must be a string"),
        ({"prompt": "a", "completions": ["b"]}, "there is no column 'scores'"),
        ({"prompt": "a", "completions": ["b"], "scores": [1, 2]}, "1 completions but 2 scores"),
        ({"prompt": "a", "completions": ["b"], "scores": [math.nan]}, "'scores' must be a finite number"),
        ({"prompt": "a", "completions": ["b"], "scores": [1], "stop_reasons": ["tired"]}, "'tired' is no stop reason"),
        ({"prompt": "a", "completions": ["b"], "scores": [1], "completion_ids": [[0.5]]}, "whole numbers"),
    ],
)
def test_rows_that_are_no_samples(row, what):
    with pytest.raises(DataError, match=what) as raised:
        read({"prompt": "a", "completions": ["b"], "scores": [1]}, row, scores_column="scores")
    assert raised.value.where == "row 2"


def test_any_cell_as_json():
    value = {"a": np.float32(0.5), "b": np.array([[1], [2]]), 3: (math.nan, math.inf, None, True)}
    assert plain_json(value) == {"a": 0.5, "b": [[1], [2]], "3": [None, None, None, True]}
    assert plain_json(datetime.date(2025, 1, 2)) == "2025-01-02"
