"""Completions of many prompts, written to a file part by part: stopped at any moment, it is gone on with to the bit.

Beside the file, under its name and ``.config.json``, lies what it was begun with. Lines: see ``data.sampled``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trueup.data.prompts import PromptRow, Request, requests_fingerprint
from trueup.data.sampled import sampled_line
from trueup.errors import CheckpointError
from trueup.records import Completion, CompletionGroup, StopReason, Text
from trueup.rollout.engine import Engine
from trueup.rollout.settings import SamplingParams
from trueup.runs.files import write_atomic, write_errors
from trueup.runs.line_file import Line, Resume, append, begun, keep_lines
from trueup.runs.progress import RunProgress


@dataclass(frozen=True, kw_only=True)
class Written:
    """A finished file of samples: of all N completions the ``lengths`` in tokens, int64, and why they end."""

    path: Path
    num_prompts: int
    lengths: np.ndarray
    stop_reasons: tuple[StopReason, ...]

    @property
    def truncated(self) -> float:
        """Share of the completions that were cut at the length limit."""
        return float(np.mean([reason is StopReason.LENGTH for reason in self.stop_reasons]))


def write_samples(
    engine: Engine,
    requests: Sequence[Request],
    sampling: SamplingParams,
    output: Path,
    *,
    text_of: Callable[[PromptRow, Completion], Text],
    started_with: Mapping[str, Any],
    prompts_per_part: int = 64,
    resume: Resume = "no",
    quiet: bool = False,
) -> Written:
    """Sample every request's completions and write one line for each, in their order.

    ``text_of``: what a completion says. ``started_with``: all that decides what is sampled, by name, ready for JSON;
    the requests are added to it. A part is sampled in one call of the engine. What a completion is may depend, by
    rounding, on what is computed beside it; since parts are the same in every run, one that was stopped writes the same
    file as one that was not. ``resume`` goes on behind the last whole part.

    Raises ``SettingsError`` for a file that exists without ``resume``; ``CheckpointError`` for one that is not there
    under "yes", that was begun with something else, or that can't be written.
    """
    record = dict(started_with) | {"prompts": requests_fingerprint(requests), "prompts_per_part": prompts_per_part}
    done = open_file(output, record, resume)
    whole = len(done) if len(done) == len(requests) else len(done) // prompts_per_part * prompts_per_part
    if whole < len(done):
        keep_lines(output, whole)
    lengths = [length for line in done[:whole] for length in line[0]]
    reasons = [reason for line in done[:whole] for reason in line[1]]
    with RunProgress(len(requests), title="sample", done=whole, quiet=quiet) as progress:
        for part in _parts(requests[whole:], prompts_per_part):
            with progress.meter(
                len(part) * sampling.num_completions * sampling.max_new_tokens,
                "tokens",
                at_most=True,
                part_of_step=True,
            ) as advance:
                groups = engine.generate(
                    [each.tokens for each in part],
                    sampling,
                    requests=[each.number for each in part],
                    progress=advance,
                )
            append(output, [_line(each, group, text_of) for each, group in zip(part, groups, strict=True)])
            completions = [completion for group in groups for completion in group.completions]
            lengths += [len(completion.tokens) for completion in completions]
            reasons += [completion.stop_reason for completion in completions]
            progress.step(num_steps=len(part), num_tokens=sum(len(each.tokens) for each in completions))
    return Written(
        path=output,
        num_prompts=len(requests),
        lengths=np.array(lengths, dtype=np.int64),
        stop_reasons=tuple(reasons),
    )


def _parts(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for first in range(0, len(requests), size):
        yield requests[first : first + size]


def _line(request: Request, group: CompletionGroup, text_of: Callable[[PromptRow, Completion], Text]) -> Line:
    texts = [text_of(request.row, completion) for completion in group.completions]
    return sampled_line(request.number, request.row, group, texts)


# -------------------------------------------------------------------------------------------------------- going on


def open_file(output: Path, record: Mapping[str, Any], resume: Resume) -> list[tuple[list[int], list[StopReason]]]:
    """Lengths and stop reasons of the lines that are there; a file that is not there is begun with its ``record``."""
    lines = begun(output, resume, "samples", '{"request": ', _read)
    config = config_path(output)
    if output.exists():
        _check_same(config, record)
    else:
        with write_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(config, (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode())
            output.touch()
    return lines


def config_path(output: Path) -> Path:
    """``samples.jsonl`` → ``samples.jsonl.config.json``."""
    return output.with_name(f"{output.name}.config.json")


def _read(line: Line) -> tuple[list[int], list[StopReason]]:
    lengths, reasons = line["lengths"], [StopReason(reason) for reason in line["stop_reasons"]]
    if not len(lengths) == len(reasons) == len(line["completions"]):
        raise ValueError
    return lengths, reasons


def _check_same(config: Path, record: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` that names what is not as it was when the file was begun."""
    way_out = "give what the file was begun with, or start anew in another --output"
    try:
        then = json.loads(config.read_text(encoding="utf-8"))
        changed = [name for name in {**then, **record} if then.get(name) != json.loads(json.dumps(record.get(name)))]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            "what the samples were begun with can't be read",
            where=str(config),
            way_out="start anew in another --output",
        ) from error
    if not changed:
        return
    name = changed[0]
    if name.startswith("--"):
        what = f"{name} was {then.get(name)!r} and is {record.get(name)!r} now"
    else:
        what = f"not what this file was begun with: {', '.join(each for each in changed if not each.startswith('--'))}"
    raise CheckpointError(what, where=str(config), way_out=way_out)
