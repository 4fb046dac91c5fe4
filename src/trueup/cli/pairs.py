"""``trueup pairs``: several scored completions of each prompt become preferences.

Importing this file is quick; what is heavy is loaded when the command runs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trueup.data.settings import TextSettings, TokenizeSettings
from trueup.errors import DataError, SettingsError
from trueup.rewards.settings import RewardChoice
from trueup.runs.settings import check_choices, check_range, check_used

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from trueup.data.sampled import SampledRow
    from trueup.rewards.rewards import Rewards
    from trueup.rewards.samples import Samples

ROWS_PER_CALL = 64
"""Rows whose completions are given to the rewards together."""


@dataclass(frozen=True, kw_only=True)
class PairsSettings(TextSettings, RewardChoice):
    """Make preference pairs, or ranked lists, of several completions of each prompt and their scores."""

    data: tuple[str, ...] = ()
    """Files with prompt and completions, such as trueup sample writes: JSONL, JSON, CSV, Parquet; .gz and .zst too."""
    output: str = "pairs.jsonl"
    """File to write: prompt, chosen, rejected; or prompt, completions, scores with --pairs ranked."""
    scores_column: str = "scores"
    """Without --reward: the column that holds a score for each completion."""
    pairs: Literal["best_worst", "all", "ranked"] = "best_worst"
    """Of each prompt the best against the worst, every two, or the whole list, best first."""
    min_gap: float = 0.0
    """Smallest difference of two scores that makes one better. In a ranked list: of one and the next."""
    ties: Literal["drop", "keep"] = "drop"
    """Equal scores: no pair, or a pair in both orders, which teaches that neither is better."""
    margin: bool = False
    """Write the difference of the scores as the pair's margin."""
    truncated: Literal["drop", "keep"] = "drop"
    """Completions cut at the length limit: training would give them an end that they don't have."""
    limit: int | None = None
    """Read at most this many rows."""
    tokenizer: str | None = None
    """With --reward and data that don't say their tokens: the model whose tokenizer counts them."""
    tokens_per_batch: int = 8192
    """Reward models: most tokens in one forward pass."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Reward models: compute precision; auto takes bfloat16 where the hardware has it."""
    device: str = "auto"
    """Reward models: cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        TextSettings.__post_init__(self)
        RewardChoice.__post_init__(self)
        check_choices(self)
        check_range(self, "min_gap", at_least=0)
        for name in ("limit", "tokens_per_batch"):
            check_range(self, name, at_least=1)
        check_used(self, self.pairs != "ranked", "--pairs best_worst or all", "ties", "margin")
        check_used(self, self.min_gap == 0, "--min-gap 0", "ties")
        check_used(self, bool(self.reward), "--reward", "reward_weights", "tokenizer")
        if self.reward and self.scores_column != "scores":
            raise SettingsError(
                "has no effect beside --reward", where="--scores-column", way_out="leave out one of them"
            )


def pairs(settings: PairsSettings) -> None:
    """Score, choose and write, and say what became of the prompts. Raises ``TrueupError`` for what can be mended."""
    if not settings.data:
        raise SettingsError("no data is given", where="--data", way_out="--data samples.jsonl")
    output = Path(settings.output)
    if output.exists():
        raise SettingsError(
            "there is such a file already", where=str(output), way_out="name another --output, or remove it"
        )
    from trueup.data.report import ReadReport
    from trueup.data.sampled import read_sampled
    from trueup.runs.files import write_atomic, write_errors

    report = ReadReport()
    column = None if settings.reward else settings.scores_column
    rows = list(islice(read_sampled(settings.data, report=report, scores_column=column), settings.limit))
    if not rows:
        raise DataError("there is no row", where=", ".join(settings.data))
    said: Counter[str] = Counter()
    usable = list(_usable(rows, settings, said))
    lines = [line for row in _scored(usable, settings) for line in _lines(row, settings, said)]
    if not lines:
        raise DataError(
            f"no two completions of a prompt are told apart: {_summary(said)}",
            where=", ".join(settings.data),
            way_out="sample more completions of each prompt, or take another reward or a smaller --min-gap",
        )
    with write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    print(f"data: {report.num_rows:,} prompts, {sum(len(row.completions) for row in rows):,} completions")
    if said:
        print(f"left out: {_summary(said)}")
    print(f"{output}: {len(lines):,} {'ranked lists' if settings.pairs == 'ranked' else 'pairs'}")


def _summary(said: Counter[str]) -> str:
    return "; ".join(f"{count:,} {what}" for what, count in said.items())


def _usable(rows: Sequence[SampledRow], settings: PairsSettings, said: Counter[str]) -> Iterator[SampledRow]:
    """The rows with those of their completions that can be compared; those with fewer than two are left out."""
    from trueup.data.data_format import is_empty
    from trueup.records import StopReason
    from trueup.rollout.pairs import distinct

    for row in rows:
        cut = range(0)
        if settings.truncated == "drop" and row.stop_reasons is not None:
            cut = [index for index, reason in enumerate(row.stop_reasons) if reason is StopReason.LENGTH]
        empty = [index for index, each in enumerate(row.completions) if is_empty(each) and index not in cut]
        first = [index for index in distinct(row.completions) if index not in cut and index not in empty]
        _count(said, len(cut), "completions cut at the length limit")
        _count(said, len(empty), "empty completions")
        _count(said, len(row.completions) - len(cut) - len(empty) - len(first), "repeated completions")
        if len(first) < 2:
            _count(said, 1, "prompts with fewer than two completions left")
        else:
            yield _only(row, first)


def _count(said: Counter[str], number: int, what: str) -> None:
    if number:
        said[what] += number


def _only(row: SampledRow, indices: Sequence[int]) -> SampledRow:
    """The row with some of its completions."""
    per_completion = ("completions", "stop_reasons", "completion_ids", "scores")
    values = {name: getattr(row, name) for name in per_completion}
    return replace(row, **{n: tuple(v[i] for i in indices) for n, v in values.items() if v is not None})


def _lines(row: SampledRow, settings: PairsSettings, said: Counter[str]) -> list[dict[str, Any]]:
    """What is written of one prompt."""
    import numpy as np

    from trueup.data.sampled import plain_json
    from trueup.rollout.pairs import PAIRS, ranking

    scores = np.array(row.scores, dtype=np.float64)
    prompt, texts = plain_json(row.prompt), plain_json(row.completions)
    if settings.pairs == "ranked":
        order = ranking(scores, settings.min_gap)
        _count(said, len(scores) - len(order), "completions no worse than the one before them")
        if len(order) < 2:
            _count(said, 1, "prompts whose completions are all as good")
            return []
        return [{"prompt": prompt, "completions": [texts[i] for i in order], "scores": scores[order].tolist()}]
    found = PAIRS[settings.pairs](scores, settings.min_gap, settings.ties == "keep")
    _count(said, int(not found), "prompts whose completions are all as good")
    return [
        {"prompt": prompt, "chosen": texts[better], "rejected": texts[worse]}
        | ({"margin": float(scores[better] - scores[worse])} if settings.margin else {})
        for better, worse in found
    ]


# -------------------------------------------------------------------------------------------------------------- scores


def _scored(rows: Sequence[SampledRow], settings: PairsSettings) -> Iterator[SampledRow]:
    """The rows with a score for each completion: the ones they have, or what the rewards say."""
    if not settings.reward or not rows:
        yield from rows
        return
    from trueup.rewards.rewards import Rewards
    from trueup.runs.progress import RunProgress

    rewards = Rewards.load(
        settings.reward,
        settings.reward_weights or None,
        timeout=settings.reward_timeout,
        tokenizer=_tokenizer(settings),
        text=settings,
        dtype=settings.dtype,
        device=settings.device,
        tokens_per_batch=settings.tokens_per_batch,
    )
    rows = _with_tokens(rows, settings)
    with RunProgress(len(rows), title="pairs", quiet=settings.quiet) as progress:
        for first in range(0, len(rows), ROWS_PER_CALL):
            part = rows[first : first + ROWS_PER_CALL]
            yield from score_rows(rewards, part)
            progress.step(num_steps=len(part))


def score_rows(rewards: Rewards, rows: Sequence[SampledRow]) -> list[SampledRow]:
    """The rows with what the rewards say of their completions, in one call. Raises ``RewardError``."""
    totals = rewards.score(samples_of(rows)).total
    ends = _ends(rows)
    return [
        replace(row, scores=tuple(totals[end - len(row.completions) : end].tolist()))
        for row, end in zip(rows, ends, strict=True)
    ]


def _ends(rows: Sequence[SampledRow]) -> list[int]:
    ends, end = [], 0
    for row in rows:
        end += len(row.completions)
        ends.append(end)
    return ends


def samples_of(rows: Sequence[SampledRow]) -> Samples:
    """The completions of all rows in one list; each has the columns of its row (None where the row lacks one)."""
    from trueup.records import StopReason
    from trueup.rewards.samples import Samples

    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    each = [(row, index) for row in rows for index in range(len(row.completions))]
    return Samples(
        prompts=[row.prompt for row, _ in each],
        completions=[row.completions[index] for row, index in each],
        completion_ids=[row.completion_ids[index] for row, index in each if row.completion_ids is not None],
        truncated=[row.stop_reasons is not None and row.stop_reasons[i] is StopReason.LENGTH for row, i in each],
        columns={name: [row.columns.get(name) for row, _ in each] for name in names},
        where=[row.where for row, _ in each],
    )


def _with_tokens(rows: Sequence[SampledRow], settings: PairsSettings) -> list[SampledRow]:
    """The rows, each with its completions' tokens. Raises ``DataError`` where nobody says how they are written."""
    lacking = [row for row in rows if row.completion_ids is None]
    if not lacking:
        return list(rows)
    tokenizer, how = _tokenizer(settings), TokenizeSettings.of(settings)
    if tokenizer is None:
        raise DataError(
            "the row has no completion_ids, and rewards may ask for the tokens of a completion",
            where=lacking[0].where,
            way_out="--tokenizer MODEL: the model that the completions are of, or are for",
        )
    return [
        replace(row, completion_ids=_tokens(tokenizer, row, how)) if row.completion_ids is None else row for row in rows
    ]


def _tokenizer(settings: PairsSettings) -> PreTrainedTokenizerBase | None:
    if settings.tokenizer is None:
        return None
    from trueup.models.load import load_tokenizer

    return load_tokenizer(settings.tokenizer)


def _tokens(tokenizer: PreTrainedTokenizerBase, row: SampledRow, how: TokenizeSettings) -> tuple[np.ndarray, ...]:
    from trueup.data.chat import tokenize_group
    from trueup.data.report import ReadReport
    from trueup.records import RankedCompletions

    report = ReadReport()
    example = RankedCompletions(prompt=row.prompt, completions=row.completions, where=row.where)
    group = tokenize_group(tokenizer, example, how, report)
    if group is None:
        raise DataError(next(iter(report.dropped)), where=row.where, way_out="remove the row, or raise --max-length")
    return tuple(completion.tokens for completion in group.completions)
