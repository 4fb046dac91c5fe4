"""Sampled completions, several of each prompt: the lines that ``trueup sample`` writes, and what reads them.

They are no ranked list, although they look like one: nobody has said which is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trueup.data.cells import (
    PROMPT_COLUMNS,
    as_turns,
    first_of,
    has,
    list_of,
    need,
    number,
    prompt_in,
    text_of,
)
from trueup.data.data_format import DataFormat, Note
from trueup.data.report import ReadReport, read_all
from trueup.data.rows import Fields, Row, Source, scan_rows
from trueup.errors import DataError
from trueup.records import CompletionGroup, RankedCompletions, StopReason, Text

if TYPE_CHECKING:
    from trueup.data.prompts import PromptRow  # which knows the formats of preferences, and these know this one

WANTED = "a row has prompt and completions (a list of texts or message lists), such as trueup sample writes"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRow:
    """One prompt and K completions, in no order; ``columns`` are what else a reward looks at.

    ``stop_reasons``, ``completion_ids`` (int64 [T] each) and ``scores``: K of each, where the row says so.
    """

    prompt: Text
    completions: tuple[Text, ...]
    columns: Mapping[str, Any]
    where: str = ""
    stop_reasons: tuple[StopReason, ...] | None = None
    completion_ids: tuple[np.ndarray, ...] | None = None
    scores: tuple[float, ...] | None = None


def sampled_line(request: int, row: PromptRow, group: CompletionGroup, completions: Sequence[Text]) -> dict[str, Any]:
    """A line of the file: what was sampled for one prompt, ready for JSON.

    ``request``: the number that keyed the random streams. ``group``: the completions as the engine gave them, with
    their log-probs; ``completions``: the same as text. Sums of log-probs are over a completion's tokens, in nats.
    """
    return {
        "request": request,
        "prompt": plain_json(row.prompt),
        "completions": plain_json(completions),
        "stop_reasons": [str(each.stop_reason) for each in group.completions],
        "lengths": [len(each.tokens) for each in group.completions],
        "sampler_logprobs": [_sum(each.sampler_logprobs) for each in group.completions],
        "untempered_logprobs": [_sum(each.untempered_logprobs) for each in group.completions],
        "completion_ids": [each.tokens.tolist() for each in group.completions],
        "columns": plain_json(row.columns),
        "where": row.where,
    }


def _sum(logprobs: np.ndarray | None) -> float | None:
    return None if logprobs is None else float(logprobs.sum(dtype=np.float64))


def plain_json(value: Any) -> Any:
    """A cell of any source as JSON has it: arrays as lists, what is no number as null, all else that JSON does not know
    (dates, decimals) as text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def is_sampled(fields: Fields) -> bool:
    """Whether a row is a line of ``trueup sample`` that nobody has scored."""
    return has(fields, PROMPT_COLUMNS, ["completions"], ["stop_reasons"]) and not has(fields, ["scores", "ranks"])


def read_sampled(source: Source, *, report: ReadReport, scores_column: str | None = None) -> Iterator[SampledRow]:
    """Prompts with their completions from any source, one at a time; ``report`` is filled on the way.

    Rows have ``prompt`` and ``completions``; all else but what ``sampled_line`` writes is kept as columns.
    ``scores_column`` holds a number for each completion. Raises ``DataError`` for a row that can't be read.
    """
    report.format = "sampled"

    def read(row: Row, note: Note) -> SampledRow:
        return _read(row, scores_column)

    return read_all(scan_rows(source), read, report, wanted=WANTED)


def _read(row: Row, scores_column: str | None) -> SampledRow:
    prompt, completions = _texts(row.fields)
    count = len(completions)

    def each_of(column: str) -> list[Any] | None:
        if row.fields.get(column) is None:
            return None
        items = list_of(row.fields[column], column)
        if len(items) != count:
            raise DataError(f"{count} completions but {len(items)} {column}")
        return items

    reasons, ids = each_of("stop_reasons"), each_of("completion_ids")
    scores = None
    if scores_column is not None:
        scores = each_of(scores_column)
        if scores is None:
            raise DataError(
                f"there is no column {scores_column!r} with scores",
                way_out="score the completions with --reward, or name the column that holds their scores",
            )
    return SampledRow(
        prompt=prompt,
        completions=completions,
        columns=_columns(row.fields, scores_column),
        where=row.where,
        stop_reasons=None if reasons is None else tuple(map(_stop_reason, reasons)),
        completion_ids=None if ids is None else tuple(map(_token_ids, ids)),
        scores=None if scores is None else tuple(number(score, str(scores_column)) for score in scores),
    )


def _texts(fields: Fields) -> tuple[Text, tuple[Text, ...]]:
    """Prompt and completions, all plain text or all conversations."""
    prompt = prompt_in(fields)
    items = list_of(need(fields, "completions"), "completions")
    completions = tuple(text_of(item, f"completions[{index}]") for index, item in enumerate(items))
    if all(isinstance(text, str) for text in (prompt, *completions)):
        return prompt, completions
    return as_turns(prompt, "user"), tuple(as_turns(each, "assistant") for each in completions)


def _columns(fields: Fields, scores_column: str | None) -> dict[str, Any]:
    if isinstance(fields.get("columns"), Mapping) and has(fields, ["stop_reasons"]):
        return dict(fields["columns"])
    prompt = first_of(fields, PROMPT_COLUMNS)
    ours = {prompt, scores_column, "completions", "stop_reasons", "completion_ids"}
    return {str(name): value for name, value in fields.items() if name not in ours}


def _stop_reason(value: Any) -> StopReason:
    try:
        return StopReason(value)
    except ValueError:
        known = ", ".join(StopReason)
        raise DataError(f"{value!r:.40} is no stop reason", way_out=f"one of {known}") from None


def _token_ids(value: Any) -> np.ndarray:
    items = list_of(value, "completion_ids")
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise DataError("'completion_ids' must hold lists of whole numbers")
    return np.array(items, dtype=np.int64)


def _read_format(fields: Fields, note: Note) -> RankedCompletions:
    prompt, completions = _texts(fields)
    return RankedCompletions(prompt=prompt, completions=completions)


SAMPLED: dict[str, DataFormat] = {
    "sampled": DataFormat(
        "sampled",
        "prompt, completions, stop_reasons (what trueup sample writes)",
        is_sampled,
        _read_format,
    ),
}
