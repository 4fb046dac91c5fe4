"""A whole file of completions, scored by one reward model or several: one line a row, and what the scores are worth.

The lines are themselves data of the format ``ranked``: ``prompt``, ``completions``, ``scores``. Beside these stand
``row`` (which of the rows that were read, from 0), ``where`` it came from, and ``lengths`` in scored tokens of the
first model; of several models also ``model_scores`` [M][K] and ``std`` [K], how far they disagree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trueup.data.formats import read_examples
from trueup.data.report import ReadReport
from trueup.data.rows import Source, source_name
from trueup.errors import CheckpointError, DataError, NonFiniteError
from trueup.records import CompletionGroup, RankedCompletions
from trueup.rewards.ensembles import ensemble_mean, ensemble_std
from trueup.rewards.reward_model import RewardModel
from trueup.runs import line_file
from trueup.runs.line_file import Line, Resume, append
from trueup.runs.progress import RunProgress
from trueup.runs.statistics import (
    accuracy_interval,
    accuracy_metrics,
    calibration_metrics,
    comparison_tables,
    pair_outcomes,
)

ROWS_PER_PART = 64
"""Rows that are scored together and written together. What a score is, to the last bit, may depend on what it is
computed beside; since the parts are the same in every run, a run that was stopped and goes on writes the same file."""

SAME_SCORE = 1e-2
"""How far, in units of 1 + |score|, a score may be from the one in the file for the models to count as the same:
another machine rounds otherwise."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A finished file of scores, and what it says.

    ``metrics``: ``num_rows``, ``num_completions``, ``score_mean``, ``score_std``; where rows rank their completions,
    those of ``accuracy_metrics`` and ``calibration_metrics``, and of several models each alone: ``accuracy/model_1`` …
    ``tables``: those of ``comparison_tables``; empty without ranked rows. ``report``: the rows read, and in this run
    tokenised.
    """

    path: Path
    metrics: dict[str, float]
    tables: dict[str, list[dict[str, Any]]]
    report: ReadReport


def score_data(
    models: Sequence[RewardModel],
    source: Source,
    output: str | Path,
    *,
    data_format: str = "auto",
    limit: int | None = None,
    aggregate: Callable[[np.ndarray], np.ndarray] = ensemble_mean,
    resume: Resume = "no",
    quiet: bool = False,
) -> Scored:
    """Score every completion of ``source`` and write ``output``, one JSON object a line.

    ``aggregate`` makes one score of several models', [M, K] → [K] (``ensembles``). Whole parts are appended as they are
    done, so a run that stops at any moment leaves whole lines and at most one that is cut. ``resume`` goes on behind
    the last whole line ("auto": or starts): the part that it belongs to is scored again, which also shows whether
    models and data are the ones that the file was begun with.

    Raises ``SettingsError`` for an ``output`` that exists without ``resume``, ``CheckpointError`` for one that is not
    there under "yes", belongs to other data or models, or can't be written, ``DataError`` for data that can't be read,
    and ``NonFiniteError`` for a score that is no finite number.
    """
    output, report = Path(output), ReadReport()
    lines = begun(output, resume)
    rows = read_examples(source, task=None, data_format=data_format, report=report)
    examples = list(islice(rows, limit))
    if not examples:
        raise DataError(f"there is no row to score: {report.summary()}", where=source_name(source))
    check_same_rows(lines, examples, output)
    last = lines[-1]["row"] if lines else -1
    start = max(last, 0) // ROWS_PER_PART * ROWS_PER_PART
    with RunProgress(len(examples), title="score", done=start, quiet=quiet) as progress:
        for first in range(start, len(examples), ROWS_PER_PART):
            part = examples[first : first + ROWS_PER_PART]
            scored, num_tokens = score_part(models, part, first, aggregate, report)
            if first == start:
                again = [line for line in scored if line["row"] <= last]
                check_same_scores([line for line in lines if line["row"] >= start], again, output)
            new = [line for line in scored if line["row"] > last]
            append(output, new)
            lines += new
            progress.step(num_steps=len(part), num_tokens=num_tokens)
    return Scored(path=output, metrics=score_metrics(lines), tables=score_tables(lines), report=report)


def score_part(
    models: Sequence[RewardModel],
    examples: Sequence[RankedCompletions],
    first: int,
    aggregate: Callable[[np.ndarray], np.ndarray],
    report: ReadReport,
) -> tuple[list[Line], int]:
    """The lines of consecutive rows, the number of the ``first`` given, and how many tokens the models read.

    Each model tokenises the text itself. A row that one of them can't read is left out, and counted in ``report``.
    """
    rows: list[tuple[int, RankedCompletions, list[CompletionGroup]]] = []
    for row, example in enumerate(examples, start=first):
        groups = tokenized(models, example, report)
        if groups is not None:
            rows.append((row, example, groups))
    columns = [model.score_groups([groups[index] for _, _, groups in rows]) for index, model in enumerate(models)]
    lines = []
    for (row, example, groups), *scores in zip(rows, *columns, strict=True):
        check_finite(scores, models, example)
        lines.append(score_line(row, example, groups[0], np.stack(scores), aggregate))
    return lines, sum(group.num_tokens for _, _, groups in rows for group in groups)


def tokenized(
    models: Sequence[RewardModel], example: RankedCompletions, report: ReadReport
) -> list[CompletionGroup] | None:
    """The row in every model's tokens; None, counted once, if one of them can't read it."""
    groups = []
    for model in models:
        group = model.tokenized(example, report)
        if group is None:
            return None
        groups.append(group)
    return groups


def score_line(
    row: int,
    example: RankedCompletions,
    group: CompletionGroup,
    scores: np.ndarray,
    aggregate: Callable[[np.ndarray], np.ndarray],
) -> Line:
    """One line of the file, ready for JSON. ``scores``: [M, K]."""
    line = {
        "row": row,
        "where": example.where,
        "prompt": as_json(example.prompt),
        "completions": as_json(example.completions),
        "scores": aggregate(scores).tolist(),
        "lengths": [int(completion.completion_mask.sum()) for completion in group.completions],
    }
    several = {"model_scores": scores.tolist(), "std": ensemble_std(scores).tolist()}
    return line | several if len(scores) > 1 else line


def score_metrics(lines: Sequence[Line]) -> dict[str, float]:
    """What the lines of a file say, as in ``Scored``."""
    scores = np.concatenate([np.empty(0), *(np.asarray(line["scores"]) for line in lines)])
    metrics: dict[str, float] = {"num_rows": len(lines), "num_completions": len(scores)}
    if len(scores):
        metrics |= {"score_mean": float(scores.mean()), "score_std": float(scores.std())}
    gaps, length_gaps, lists = ranked_pairs(lines)
    if len(gaps) == 0:
        return metrics
    metrics |= accuracy_metrics(pair_outcomes(gaps), length_gaps, lists) | calibration_metrics(gaps, lists)
    for index in range(num_models(lines[0]) if num_models(lines[0]) > 1 else 0):
        alone, _, _ = ranked_pairs([line | {"scores": line["model_scores"][index]} for line in lines])
        name = f"accuracy/model_{index + 1}"
        interval = accuracy_interval(pair_outcomes(alone), lists=lists)
        metrics |= dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
    return metrics


def score_tables(lines: Sequence[Line]) -> dict[str, list[dict[str, Any]]]:
    """The tables behind the figures, as in ``Scored``."""
    gaps, length_gaps, lists = ranked_pairs(lines)
    return comparison_tables(gaps, length_gaps, lists) if len(gaps) else {}


def ranked_pairs(lines: Sequence[Line]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every pair that the rankings imply: score and length of the better minus the worse, and its row. Three [N]."""
    parts = [(np.empty(0), np.empty(0), np.empty(0, dtype=np.int64))]
    for line in lines:
        scores, lengths = np.asarray(line["scores"]), np.asarray(line["lengths"])
        better, worse = np.triu_indices(len(scores), 1)
        rows = np.full(len(better), line["row"])
        parts.append((scores[better] - scores[worse], lengths[better] - lengths[worse], rows))
    gaps, length_gaps, rows = (np.concatenate(each) for each in zip(*parts, strict=True))
    return gaps, length_gaps, rows


def num_models(line: Line) -> int:
    return len(line.get("model_scores", [None]))


# ------------------------------------------------------------------------------------------------------- the file


def begun(output: Path, resume: Resume) -> list[Line]:
    """The whole lines of a file of scores that a run left; a last line that was cut is cut away. No file has none."""
    return line_file.begun(output, resume, "scores", '{"row": ', read_line)


def read_line(record: Line) -> Line:
    """Raise ``ValueError`` or ``KeyError`` for what isn't a line of scores."""
    if not len(record["scores"]) == len(record["lengths"]) == len(record["completions"]) or record["row"] < 0:
        raise ValueError
    return record


def check_same_rows(lines: Sequence[Line], examples: Sequence[RankedCompletions], output: Path) -> None:
    """Raise ``CheckpointError`` unless every line is of the row that it says."""
    for number, line in enumerate(lines, start=1):
        row = line["row"]
        example = examples[row] if row < len(examples) else None
        if example is None or [as_json(example.prompt), as_json(example.completions)] != [
            line["prompt"],
            line["completions"],
        ]:
            raise CheckpointError(
                f"row {row} of the data is another one now",
                where=f"{output}:{number}",
                way_out="give the data that the file was begun with, or start anew in another --output",
            )


def check_same_scores(then: Sequence[Line], now: Sequence[Line], output: Path) -> None:
    """Raise ``CheckpointError`` unless the lines that stand in the file are those that were found just now."""
    if [line["row"] for line in then] != [line["row"] for line in now] or not all(map(alike, then, now)):
        raise CheckpointError(
            "its last scores are not those of the models and settings given now",
            where=str(output),
            way_out="give the ones that the file was begun with, or start anew in another --output",
        )


def alike(one: Line, other: Line) -> bool:
    """Whether two lines have the same scores, up to rounding: of every model, and together."""
    first, second = (np.array([each["scores"], *each.get("model_scores", [])]) for each in (one, other))
    return first.shape == second.shape and bool((abs(first - second) <= SAME_SCORE * (1 + abs(second))).all())


def check_finite(scores: Sequence[np.ndarray], models: Sequence[RewardModel], example: RankedCompletions) -> None:
    """Raise ``NonFiniteError`` that names the model and the row."""
    for model, each in zip(models, scores, strict=True):
        if not np.isfinite(each).all():
            raise NonFiniteError(
                f"the score that {model.name} gives is not a finite number",
                where=example.where or None,
                way_out="try --dtype float32; if it stays, the model is broken",
            )


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file."""
    return json.loads(json.dumps(value, ensure_ascii=False, default=str))
