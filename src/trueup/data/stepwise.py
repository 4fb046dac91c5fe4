"""Formats of answers that are labelled step by step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trueup.data.cells import (
    PROMPT_COLUMNS,
    as_turns,
    first_of,
    has,
    list_of,
    need,
    number,
    prompt_in,
    string,
    string_in,
)
from trueup.data.data_format import DataFormat, Dropped, Note
from trueup.data.rows import Fields
from trueup.errors import DataError
from trueup.records import RankedCompletions, Text

STEP_COLUMNS = ("steps", "completions")
RATINGS = {1.0: 1.0, 0.0: 1.0, -1.0: 0.0}
"""What people called a step, good, neutral or bad → how right it is: a neutral step is no mistake."""


def is_stepwise(fields: Fields) -> bool:
    return has(fields, PROMPT_COLUMNS, ["steps"]) or has(fields, PROMPT_COLUMNS, ["completions"], ["labels"])


def _read_stepwise(fields: Fields, note: Note) -> RankedCompletions:
    """Labels are true, false, or a share of right in [0, 1]; ratings are 1, 0 (neutral) or -1; null is not labelled.

    They are two columns because a 0 means two things.
    """
    prompt = prompt_in(fields)
    column = first_of(fields, STEP_COLUMNS) or "steps"
    steps = [string(step, f"{column}[{index}]") for index, step in enumerate(list_of(need(fields, column), column))]
    column = first_of(fields, ("labels", "ratings")) or "labels"
    read = _rating if column == "ratings" else _label
    labels = [
        None if label is None else read(label, f"{column}[{index}]")
        for index, label in enumerate(list_of(need(fields, "labels", "ratings"), column))
    ]
    return _stepwise(prompt, steps, labels)


def _label(value: Any, column: str) -> float:
    label = float(value) if isinstance(value, bool) else number(value, column)
    if not 0 <= label <= 1:
        raise DataError(
            f"{column!r} must lie between 0 and 1, found {value!r:.40}",
            way_out="ratings of 1, 0 (neutral) and -1 go into a column 'ratings'",
        )
    return label


def _rating(value: Any, column: str) -> float:
    rating = number(value, column)
    if rating not in RATINGS:
        raise DataError(f"{column!r} must be 1, 0 (neutral) or -1, found {value!r:.40}")
    return RATINGS[rating]


def _stepwise(prompt: Text, steps: Sequence[str], labels: Sequence[float | None]) -> RankedCompletions:
    if len(labels) != len(steps):
        raise DataError(f"{len(steps)} steps but {len(labels)} labels", way_out="label each step; null where not known")
    for place, step in enumerate(steps, 1):
        if not step.strip():
            raise DataError(f"step {place} is empty", way_out="remove it, and its label")
    if not steps:
        raise Dropped("no steps")
    if all(label is None for label in labels):
        raise Dropped("no step is labelled")
    text = "\n".join(steps)
    return RankedCompletions(
        prompt=prompt,
        completions=(text if isinstance(prompt, str) else as_turns(text, "assistant"),),
        steps=(tuple(steps),),
        step_labels=(tuple(labels),),
    )


_SHEPHERD_MARK, _SHEPHERD_START = "ки", "Step 1:"


def _is_math_shepherd(fields: Fields) -> bool:
    return has(fields, ["input"], ["label"]) and _SHEPHERD_MARK in str(fields["input"])


def _read_math_shepherd(fields: Fields, note: Note) -> RankedCompletions:
    """The same text twice: with a mark behind each step in ``input``, with + or - in its place in ``label``."""
    marked, judged = (string_in(fields, column) for column in ("input", "label"))
    *parts, tail = marked.split(_SHEPHERD_MARK)
    signs = re.fullmatch("([+-])".join(map(re.escape, (*parts, tail))), judged)
    if not parts or signs is None:
        raise DataError(f"'label' is not 'input' with + or - in place of every {_SHEPHERD_MARK}")
    question, start, opening = parts[0].partition(_SHEPHERD_START)
    if not start:
        raise DataError(f"'input' has no {_SHEPHERD_START!r}, so the question's end is not known")
    if tail.strip():
        note("text behind the last labelled step left out")
    steps = [step.strip() for step in (start + opening, *parts[1:])]
    return _stepwise(f"{question.strip()}\n", steps, [float(sign == "+") for sign in signs.groups()])


STEPWISE: dict[str, DataFormat] = {
    "stepwise": DataFormat(
        "process",
        "prompt, steps (or completions), labels (true or false, or 0 to 1) or ratings (1, 0, -1), one per step",
        is_stepwise,
        _read_stepwise,
    ),
    "math_shepherd": DataFormat(
        "process",
        f"input (question and steps, {_SHEPHERD_MARK} behind each step), label (the same, + or - in its place)",
        _is_math_shepherd,
        _read_math_shepherd,
    ),
}
