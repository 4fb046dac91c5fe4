"""A look at data before training: format, counts, lengths, what is dropped and why, and what exactly is trained."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np

from trueup.data.chat import tokenize_group, tokenize_prompt
from trueup.data.collate import train_all_tokens
from trueup.data.data_format import Task
from trueup.data.formats import FORMATS, read_examples
from trueup.data.prompts import PromptRow
from trueup.data.report import ReadReport
from trueup.data.rows import Source
from trueup.data.settings import TokenizeSettings
from trueup.records import Completion, CompletionGroup, RankedCompletions, Text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
"""What stands around trained text, also where there are no colours."""

PERCENTILES = (5, 50, 95, 99)
MAX_SHOWN = 1200
"""Characters of one part of an example that are shown; the middle of a longer one is left out."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of an example's text, and whether it is trained."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class ShownExample:
    """A prompt and its completions, best first, as stretches of text."""

    where: str
    prompt: tuple[Part, ...]
    titles: tuple[str, ...]
    """What each completion is called."""
    completions: tuple[tuple[Part, ...], ...]
    cut: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What a file holds. Lengths: int64 [rows kept] for prompts, one array per row for its completions, in ``unit``."""

    report: ReadReport
    unit: str
    prompt_lengths: np.ndarray
    completion_lengths: tuple[np.ndarray, ...]
    desirable: tuple[bool, ...]
    """The labels of unpaired data, of all rows."""
    step_labels: np.ndarray
    """How right each step is, of all rows that are labelled step by step: float32 [M], NaN where nobody said."""
    examples: tuple[ShownExample, ...]

    @property
    def longer_wins(self) -> float | None:
        """How often the chosen side of a pair is the longer one (ties count ½): what always preferring the longer
        answer would score. None without pairs."""
        gaps = [int(lengths[0] - lengths[1]) for lengths in self.completion_lengths if len(lengths) == 2]
        return float(np.mean(np.sign(gaps) / 2 + 0.5)) if gaps else None


def check_data(
    source: Source,
    *,
    task: Task | None = None,
    data_format: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: TokenizeSettings | None = None,
    train_on: Literal["completion", "all"] = "completion",
    num_examples: int = 3,
) -> DataCheck:
    """Read all of ``source`` and measure it: in tokens with a tokenizer, otherwise in words.

    ``train_on``: what the examples show as trained; with "all", demonstrations as ``train_all_tokens`` makes them.
    Malformed rows are collected in the report; reading goes on after them. Raises ``DataError`` for a source that can't
    be read at all, ``ModelError`` for a tokenizer that does not do.
    """
    report = ReadReport()
    settings = settings or TokenizeSettings()
    prompts: list[int] = []
    completions: list[np.ndarray] = []
    desirable: list[bool] = []
    step_labels: list[np.ndarray] = []
    shown: list[ShownExample] = []
    for example in read_examples(source, task=task, data_format=data_format, report=report, strict=False):
        group = None
        if tokenizer is not None:
            group = _tokenized(tokenizer, example, settings, report)
            if group is None:
                continue
        if group is None:
            prompts.append(_num_words(example.prompt))
            completions.append(np.array([_num_words(completion) for completion in example.completions]))
        else:
            prompts.append(len(group.prompt))
            completions.append(np.array([len(completion.tokens) for completion in group.completions]))
        desirable += example.desirable or ()
        step_labels += _step_labels(group or example)
        if len(shown) < num_examples:
            everything = train_on == "all"
            shown.append(
                _shown_text(example, everything=everything)
                if group is None
                else _shown_tokens(tokenizer, train_all_tokens(group) if everything else group)
            )
    return DataCheck(
        report=report,
        unit="words" if tokenizer is None else "tokens",
        prompt_lengths=np.array(prompts, dtype=np.int64),
        completion_lengths=tuple(completions),
        desirable=tuple(desirable),
        step_labels=np.concatenate([np.empty(0, dtype=np.float32), *step_labels]),
        examples=tuple(shown),
    )


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, example: RankedCompletions, settings: TokenizeSettings, report: ReadReport
) -> CompletionGroup | None:
    if example.completions:
        return tokenize_group(tokenizer, example, settings, report)
    row = PromptRow(prompt=example.prompt, columns={}, where=example.where)
    prompt = tokenize_prompt(tokenizer, row, settings, report)
    return None if prompt is None else CompletionGroup(prompt=prompt, completions=(), where=example.where)


def _num_words(text: Text) -> int:
    return len(text.split()) if isinstance(text, str) else sum(len(str(turn["content"]).split()) for turn in text)


def _step_labels(record: RankedCompletions | CompletionGroup) -> list[np.ndarray]:
    """Of each completion that is labelled step by step."""
    if isinstance(record, CompletionGroup):
        return [each.step_labels for each in record.completions if each.step_labels is not None]
    return [np.array(labels, dtype=np.float32) for labels in record.step_labels or ()]


def _titles(record: RankedCompletions | CompletionGroup) -> tuple[str, ...]:
    if labels := _step_labels(record):
        return tuple(f"completion, steps labelled {' '.join(map(_label, each))}" for each in labels)
    if record.desirable is not None:
        return tuple("desirable" if good else "undesirable" for good in record.desirable)
    named = {1: ("completion",), 2: ("chosen", "rejected")}
    size = len(record.completions)
    return named.get(size, tuple(f"rank {rank}" for rank in range(1, size + 1)))


def _label(label: float) -> str:
    return "?" if np.isnan(label) else f"{label:g}"


def _trained(completion: Completion) -> np.ndarray:
    """bool [T]: the tokens that something is learned at: those that the model wrote, or the ends of labelled steps."""
    if completion.step_ends is None or completion.step_labels is None:
        return completion.completion_mask
    labelled = completion.step_ends[~np.isnan(completion.step_labels)]
    return np.isin(np.arange(len(completion.tokens)), labelled)


def _shown_text(example: RankedCompletions, *, everything: bool) -> ShownExample:
    """Without a tokenizer: the turns by name; as trained what the assistant says in a completion, or everything."""

    def parts(text: Text, *, completion: bool) -> tuple[Part, ...]:
        if isinstance(text, str):
            return (Part(text=text, trained=completion or everything),)
        return tuple(
            part
            for turn in text
            for part in (
                Part(text=f"{turn['role']}: ", trained=False),
                Part(text=str(turn["content"]), trained=everything or (completion and turn["role"] == "assistant")),
                Part(text="\n", trained=False),
            )
        )

    return ShownExample(
        where=example.where,
        prompt=parts(example.prompt, completion=False),
        titles=_titles(example),
        completions=tuple(parts(completion, completion=True) for completion in example.completions),
        cut=(False,) * len(example.completions),
    )


def _shown_tokens(tokenizer: PreTrainedTokenizerBase | None, group: CompletionGroup) -> ShownExample:
    """With a tokenizer: exactly the tokens, special ones included, as the model gets them."""
    assert tokenizer is not None

    def parts(tokens: np.ndarray, mask: np.ndarray) -> tuple[Part, ...]:
        stretches = groupby(range(len(tokens)), key=lambda index: bool(mask[index]))
        return tuple(
            Part(text=str(tokenizer.decode(tokens[list(indices)].tolist())), trained=trained)
            for trained, indices in stretches
        )

    return ShownExample(
        where=group.where,
        prompt=parts(group.prompt, np.zeros(len(group.prompt), dtype=bool)),
        titles=_titles(group),
        completions=tuple(parts(each.tokens, _trained(each)) for each in group.completions),
        cut=tuple(each.truncated for each in group.completions),
    )


# ---------------------------------------------------------------------------------------------------------- output


def visible(text: str) -> str:
    """``text`` with everything that a terminal would obey rather than show written out: ``\\x1b``, ``\\u202e``.

    Line breaks and tabs stay. The brackets that mark trained text are written out too, so that data can't forge them.
    """
    return "".join(_written_out(each) if _is_obeyed(each) or each in OPEN + CLOSE else each for each in text)


def _is_obeyed(character: str) -> bool:
    """Control, format (also the bidirectional ones), surrogate, private and unassigned characters; odd separators."""
    return character not in "\n\t " and unicodedata.category(character)[0] in "CZ"


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _shortened(text: str) -> str:
    if len(text) <= MAX_SHOWN:
        return text
    half = MAX_SHOWN // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def print_check(check: DataCheck, console: Console, *, name: str) -> None:
    """Print a check. All that comes from the data is shown, never interpreted: neither markup nor control codes."""
    for block in _blocks(check, name):
        console.print(block, markup=False, highlight=False, soft_wrap=True)


def _blocks(check: DataCheck, name: str) -> Iterator[RenderableType]:
    from rich.text import Text as Line

    report = check.report
    yield Line(visible(name), style="bold")
    how = "detected" if report.detected else "as told"
    yield Line(f"  format   {report.format} ({how}): {FORMATS[report.format].columns}")
    if report.side:
        yield Line(f"           preference data read as demonstrations: the {report.side} side only")
    yield Line(f"  rows     {report.num_rows:,} read, {report.num_kept:,} kept{_sizes(check)}")
    yield from map(Line, _counted("dropped", report.dropped, report.first_dropped))
    yield from map(Line, _counted("noted", report.noted, report.first_noted))
    if report.malformed:
        malformed = {error.what: 0 for error in report.malformed}
        first = {error.what: error.where or "" for error in reversed(report.malformed)}
        for error in report.malformed:
            malformed[error.what] += 1
        yield from map(Line, _counted("broken", malformed, first))
    if report.num_completions_cut:
        yield Line(f"  cut      {report.num_completions_cut:,} completions, whose end is not trained")
    if report.num_prompts_cut:
        yield Line(f"  cut      {report.num_prompts_cut:,} prompts, to their last tokens")
    if len(check.prompt_lengths):
        yield Line()
        yield _length_table(check)
    if check.longer_wins is not None:
        yield Line()
        yield Line(
            f"  The chosen side is the longer one in {100 * check.longer_wins:.1f} % of the pairs (ties count ½)."
        )
    for number, example in enumerate(check.examples, 1):
        yield Line()
        yield Line(f"── example {number}: {visible(example.where)} ", style="bold")
        yield from _example_lines(example)
    if any(example.completions for example in check.examples):
        yield Line()
        what = "where a step is scored" if len(check.step_labels) and check.unit == "tokens" else "trained"
        yield Line(f"{OPEN}…{CLOSE} is {what}" + ("" if check.unit == "tokens" else "; with --tokenizer: every token"))


def _counted(title: str, counts: dict[str, int], first: dict[str, str]) -> Iterator[str]:
    for place, (what, count) in enumerate(counts.items()):
        yield visible(f"  {title if place == 0 else '':8} {count:,} × {what} (first: {first[what]})")


def _sizes(check: DataCheck) -> str:
    if labelled := int((~np.isnan(check.step_labels)).sum()):
        return f" ({labelled:,} labelled steps, {100 * np.nanmean(check.step_labels):.1f} % right)"
    if check.desirable:
        return f" ({100 * np.mean(check.desirable):.0f} % desirable)"
    sizes = sorted({len(lengths) for lengths in check.completion_lengths})
    if sizes in ([], [0], [1]):
        return ""
    return " (pairs)" if sizes == [2] else f" ({sizes[0]} to {sizes[-1]} ranked completions each)"


def _length_table(check: DataCheck) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"  length in {check.unit}")
    for title in ("mean", "least", *(f"{percentile} %" for percentile in PERCENTILES), "most"):
        table.add_column(title, justify="right")
    for title, lengths in _measured(check):
        numbers = [np.mean(lengths), np.min(lengths), *np.percentile(lengths, PERCENTILES), np.max(lengths)]
        table.add_row(f"  {title}", *(f"{number:,.0f}" for number in numbers))
    return table


def _measured(check: DataCheck) -> Iterator[tuple[str, Sequence[int]]]:
    lengths = check.completion_lengths
    yield "prompt", check.prompt_lengths.tolist()
    if not any(map(len, lengths)):
        return  # prompts alone
    if {len(each) for each in lengths} == {2}:
        yield "chosen", [int(each[0]) for each in lengths]
        yield "rejected", [int(each[1]) for each in lengths]
    else:
        yield "completion", [int(length) for each in lengths for length in each]
    longest = zip(check.prompt_lengths, lengths, strict=True)
    yield "prompt + longest completion", [int(prompt + each.max()) for prompt, each in longest]


def _example_lines(example: ShownExample) -> Iterator[RenderableType]:
    yield _marked(example.prompt)
    from rich.text import Text as Line

    for title, completion, cut in zip(example.titles, example.completions, example.cut, strict=True):
        yield Line(f"── {title}{' (cut)' if cut else ''}", style="bold")
        yield _marked(completion)


def _marked(parts: Iterable[Part]) -> RenderableType:
    from rich.text import Text as Line

    line = Line()
    for part in parts:
        text = visible(_shortened(part.text))
        line.append(f"{OPEN}{text}{CLOSE}" if part.trained else text, style="green" if part.trained else "dim")
    line.rstrip()
    return line
