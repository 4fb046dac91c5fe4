"""All formats, which of them rows have, and reading: from any source to prompts with their completions.

What can't be read raises ``DataError`` with the place; what can be read but teaches nothing is dropped and counted in
the ``ReadReport``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from trueup.data.cells import columns
from trueup.data.data_format import DataFormat, Dropped, Note, Task
from trueup.data.demonstrations import DEMONSTRATIONS
from trueup.data.preferences import PREFERENCES
from trueup.data.prompts import PROMPTS
from trueup.data.report import ReadReport, read_all
from trueup.data.rows import Row, Source, scan_rows, source_name
from trueup.data.sampled import SAMPLED
from trueup.data.stepwise import STEPWISE
from trueup.errors import DataError
from trueup.records import RankedCompletions

FORMATS: dict[str, DataFormat] = STEPWISE | SAMPLED | PREFERENCES | DEMONSTRATIONS | PROMPTS
"""By name, in the order of trial: the more a row must have, the earlier."""

ROWS_TO_DETECT = 32
"""How many rows the format is judged by."""

TASKS: dict[Task | None, tuple[Task, ...]] = {
    "sft": ("sft", "preference"),
    "preference": ("preference",),
    "process": ("process",),
    "prompt": ("prompt",),
    "sampled": ("sampled",),
    None: ("process", "preference", "sft"),
}
"""Whose formats a task reads, in the order of trial; None: all that can be trained on as they stand. The best side of a
preference is a demonstration."""

USES: dict[Task, str] = {
    "sft": "train on them with trueup sft",
    "preference": "train on them with trueup reward or trueup preference",
    "process": "train on them with trueup reward --process",
    "prompt": "have them answered with trueup sample, look at them with trueup data check --task prompt",
    "sampled": "make pairs of them with trueup pairs",
}
"""What to do with a task's data."""


def format_names(task: Task | None) -> list[str]:
    """The formats that a task reads, in the order of trial."""
    return [name for kind in TASKS[task] for name, each in FORMATS.items() if each.task == kind]


def detect_format(first_rows: Sequence[Row], task: Task | None) -> str:
    """The name of the format that the first rows have, by their columns and the types in them.

    For ``sft`` the formats of demonstrations are tried first, then those of preferences, whose best side is a
    demonstration; ``None`` tries all. Raises ``DataError`` where no format fits or the rows disagree.
    """
    names = format_names(task)
    found: dict[str | None, Row] = {}
    for row in first_rows:
        found.setdefault(next((name for name in names if FORMATS[name].matches(row.fields)), None), row)
    wanted = "\n".join(f"      {name:18} {FORMATS[name].columns}" for name in names)
    if not found:
        raise DataError("there are no rows")
    if None in found:
        row = found[None]
        other = next((name for name in FORMATS if FORMATS[name].matches(row.fields)), None)
        if other:
            raise DataError(
                f"these are rows of the format '{other}', not {task or 'training'} data",
                where=row.where,
                way_out=f"{USES[FORMATS[other].task]}, or name the format with data_format",
            )
        raise DataError(
            f"no known format has these columns and types: {columns(row.fields)}",
            where=row.where,
            way_out=f"rename the columns, or name the format with data_format. Known:\n{wanted}",
        )
    if len(found) > 1:
        first, second, *_ = found.items()
        raise DataError(
            f"looks like the format '{second[0]}', but {first[1].where} like '{first[0]}'",
            where=second[1].where,
            way_out="keep one format in a file, or name it with data_format",
        )
    return next(str(name) for name in found)


def read_examples(
    source: Source,
    *,
    task: Task | None,
    data_format: str = "auto",
    report: ReadReport,
    split: str | None = None,
    strict: bool = True,
) -> Iterator[RankedCompletions]:
    """Prompts with their ranked completions from any source, one at a time; ``report`` is filled on the way.

    ``data_format`` is a key of ``FORMATS`` or ``auto``. For ``task="sft"`` preference data give their best side. A row
    with nothing to learn from (identical sides, an empty completion) is dropped and counted. A malformed row raises
    ``DataError`` with its place; with ``strict=False`` it is collected in the report and reading goes on.
    """
    rows = scan_rows(source, split=split)
    if data_format == "auto" and task == "prompt":
        data_format = "prompt"  # there is one way to find a prompt, and it goes row by row
    if data_format == "auto":
        first = list(itertools.islice(rows, ROWS_TO_DETECT))
        rows = itertools.chain(first, rows)
        readable = [row for row in first if isinstance(row, Row)]
        broken = [row for row in first if isinstance(row, DataError)]
        if broken and (strict or not readable):
            raise broken[0]
        try:
            data_format = detect_format(readable, task)
        except DataError as error:
            where = error.where or source_name(source)
            raise DataError(error.what, where=where, way_out=error.way_out) from None
        report.detected = True
    elif data_format not in format_names(task):
        names = ", ".join(format_names(task))
        raise DataError(f"{data_format!r} is no format of {task or 'any'} data", way_out=f"choose one of auto, {names}")
    report.format = data_format
    if task == "sft" and FORMATS[data_format].task == "preference":
        report.side = "desirable" if data_format == "unpaired" else "chosen"
    wanted = f"the format '{data_format}' wants {FORMATS[data_format].columns}"
    read = functools.partial(_read, FORMATS[data_format], task)
    yield from read_all(rows, read, report, wanted=wanted, strict=strict)


def _read(data_format: DataFormat, task: Task | None, row: Row, note: Note) -> RankedCompletions:
    example = replace(data_format.read(row.fields, note), where=row.where)
    if task != "sft":
        return example
    if example.desirable == (False,):
        raise Dropped("undesirable completion")
    return replace(example, completions=example.completions[:1], margin=None, desirable=None)
