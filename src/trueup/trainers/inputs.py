"""From the settings' files, or from objects, to the groups of every step and the held-out groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, TypeGuard

import numpy as np

from trueup.data.chat import stop_token_ids, tokenize_group
from trueup.data.collate import batches, merge_prompts, num_steps, prompt_families, split_holdout
from trueup.data.data_format import Task
from trueup.data.formats import read_examples
from trueup.data.report import ReadReport
from trueup.data.rows import source_name
from trueup.data.settings import TokenizeSettings
from trueup.errors import DataError, SettingsError
from trueup.records import CompletionGroup, RankedCompletions
from trueup.trainers.fingerprint import groups_fingerprint, stream_fingerprint, tokenizer_fingerprint
from trueup.trainers.settings import TrainSettings

Step = tuple[int, float, list[CompletionGroup]]
"""(step, epochs done when it is over, the groups of the step)"""


@dataclass(frozen=True)
class Inputs:
    """What a loop reads."""

    num_steps: int
    max_length: int
    """Most tokens in prompt and completion: what the settings allow and the model can read."""
    steps: Callable[[int], Iterator[Step]]
    """From a step number on."""
    groups: list[CompletionGroup] | None
    """All that may come in a step; None where that is not known (a stream)."""
    held_out: list[CompletionGroup]
    sampled: list[CompletionGroup]
    """The groups whose prompts are answered at every evaluation."""
    stop_tokens: list[int]
    """Where an answer ends."""
    fingerprints: dict[str, str]
    """What was read, by name: see ``fingerprint``."""


def load_inputs(
    settings: TrainSettings,
    tokenizer: Any,
    *,
    task: Task,
    say: Callable[[str], None],
    data: Any = None,
    eval_data: Any = None,
    check: Callable[[CompletionGroup], None] = lambda group: None,
    context_length: int | None = None,
    trained_as: Callable[[CompletionGroup], CompletionGroup] = lambda group: group,
    share_prompts: bool = False,
) -> Inputs:
    """Read, split, tokenise. What was read, dropped and cut is told in one line each for training and held-out data.

    ``data`` and ``eval_data``: rows, a ``datasets`` object or ``CompletionGroup`` objects, in place of the settings'.
    ``check`` raises for a group that the loop can't use. ``context_length``: most tokens that the model can read.
    ``trained_as``: what becomes of a group in steps and evaluations; what is sampled keeps its prompt.
    ``share_prompts``: the rows of one prompt come together, and those of one step as one group (of a stream, which is
    not shuffled, those that the step happens to hold). A step has ``batch_size`` rows either way.
    Raises ``SettingsError`` without data, ``DataError`` for what can't be read and where no row is left.
    """
    source = data if data is not None else settings.data
    held_out_source = eval_data if eval_data is not None else settings.eval_data
    if not _is_given(source):
        raise SettingsError("no training data is given", where="--data", way_out="--data FILE.jsonl")

    if settings.holdout and (is_tokenized(source) or _is_given(held_out_source)):
        raise SettingsError("is for rows, without eval_data", where="--holdout", way_out="give eval_data alone")
    if settings.streaming and isinstance(source, Iterator):
        raise SettingsError("needs data that can be read again: a resumed run skips what it has seen", where="data")
    max_length = min(settings.max_length, context_length or settings.max_length)
    if max_length < settings.max_length:
        say(f"the model reads {max_length:,} tokens: that is the limit, not --max-length {settings.max_length:,}")
    how = TokenizeSettings.of(settings, max_length=max_length)
    stop_tokens = stop_token_ids(tokenizer, how)

    def read(source: Any, report: ReadReport, limit: int | None = None) -> Iterator[RankedCompletions]:
        return islice(read_examples(source, task=task, data_format=settings.data_format, report=report), limit)

    def tokenize(examples: Iterable[RankedCompletions], report: ReadReport) -> Iterator[CompletionGroup]:
        groups = (tokenize_group(tokenizer, example, how, report) for example in examples)
        return checked(group for group in groups if group is not None)

    def checked(groups: Iterable[CompletionGroup]) -> Iterator[CompletionGroup]:
        for group in groups:
            if not all(completion.completion_mask.any() for completion in group.completions):
                raise DataError("a completion has no token to train on", where=group.where or None)
            check(group)
            yield group

    def held_out_groups() -> list[CompletionGroup]:
        if not _is_given(held_out_source):
            return []
        if is_tokenized(held_out_source):
            return list(checked(held_out_source))
        report = ReadReport()
        groups = list(tokenize(read(held_out_source, report), report))
        say(f"held-out data: {report.summary()}")
        return groups

    def fingerprints(held_out: Sequence[CompletionGroup]) -> dict[str, str]:
        return {"tokenizer": tokenizer_fingerprint(tokenizer), "held-out data": groups_fingerprint(held_out)}

    def together(groups: Iterable[CompletionGroup]) -> list[CompletionGroup]:
        groups = list(groups)
        return merge_prompts(groups, settings.tokens_per_batch) if share_prompts else groups

    def arranged(steps: Iterator[Step]) -> Iterator[Step]:
        return ((step, epoch, together(groups)) for step, epoch, groups in steps)

    if settings.streaming:

        def stream() -> Iterator[CompletionGroup]:
            if is_tokenized(source):
                return map(trained_as, checked(source[: settings.limit]))
            return map(trained_as, tokenize(read(source, report, settings.limit), report))

        report = ReadReport()
        held_out = held_out_groups()
        return Inputs(
            num_steps=settings.max_steps or 0,
            max_length=max_length,
            steps=lambda start: arranged(_stream_steps(stream, settings, start)),
            groups=None,
            held_out=together(map(trained_as, held_out)),
            sampled=held_out[: settings.num_samples],
            stop_tokens=stop_tokens,
            fingerprints=fingerprints(held_out)
            | {"training data": stream_fingerprint(source, islice(stream(), settings.batch_size))},
        )

    if is_tokenized(source):
        groups, held_out = list(checked(source[: settings.limit])), held_out_groups()
    else:
        report = ReadReport()
        examples, held_out_examples = split_holdout(list(read(source, report, settings.limit)), settings.holdout)
        groups = list(tokenize(examples, report))
        held_out = list(tokenize(held_out_examples, report)) if held_out_examples else held_out_groups()
        say(f"data: {report.summary()}; {len(groups):,} to train on, {len(held_out):,} held out")
    if not groups:
        raise DataError(
            "no row is left to train on", where=source_name(source), way_out="look at it: trueup data check FILE"
        )
    sampled = (held_out or groups)[: settings.num_samples]
    groups = list(map(trained_as, groups))
    families = prompt_families(groups) if share_prompts else None
    total = num_steps(len(groups), settings.batch_size, settings.num_epochs)
    return Inputs(
        num_steps=min(total, settings.max_steps or total),
        max_length=max_length,
        steps=lambda start: arranged(_shuffled_steps(groups, families, settings, start)),
        groups=groups,
        held_out=together(map(trained_as, held_out)),
        sampled=sampled,
        stop_tokens=stop_tokens,
        fingerprints=fingerprints(held_out) | {"training data": groups_fingerprint(groups)},
    )


def _shuffled_steps(
    groups: Sequence[CompletionGroup], families: np.ndarray | None, settings: TrainSettings, start: int
) -> Iterator[Step]:
    per_epoch = num_steps(len(groups), settings.batch_size, 1)
    steps = batches(
        len(groups),
        settings.batch_size,
        seed=settings.seed,
        num_epochs=settings.num_epochs,
        start_step=start,
        families=families,
    )
    for step, _, indices in steps:
        if settings.max_steps is not None and step >= settings.max_steps:
            return
        yield step, (step + 1) / per_epoch, [groups[index] for index in indices]


def _stream_steps(
    stream: Callable[[], Iterator[CompletionGroup]], settings: TrainSettings, start: int
) -> Iterator[Step]:
    """Batches in the order of the file, from its start again where it ends; what earlier steps took is read over."""

    def endless() -> Iterator[tuple[int, CompletionGroup]]:
        for epoch in count():
            empty = True
            for group in stream():
                empty = False
                yield epoch, group
            if empty:
                raise DataError("no row is left to train on", where=source_name(settings.data))

    rows = islice(endless(), start * settings.batch_size, None)
    for step in range(start, settings.max_steps or 0):
        epochs, groups = zip(*islice(rows, settings.batch_size), strict=True)
        yield step, float(epochs[-1]), list(groups)


def _is_given(source: Any) -> bool:
    return source is not None and not (isinstance(source, tuple | list) and not source)


def is_tokenized(source: Any) -> TypeGuard[Sequence[CompletionGroup]]:
    """Whether a source is groups already, not rows or names of files."""
    return isinstance(source, tuple | list) and len(source) > 0 and isinstance(source[0], CompletionGroup)
