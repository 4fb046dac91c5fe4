"""The built-in rewards, by name. Each is made from the parameters behind its name, and is a plain reward function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import regex

from trueup.errors import SettingsError, require_extra
from trueup.rewards.calls import RewardFunction
from trueup.rewards.code import CodeTests
from trueup.rewards.gym import ReasoningGym
from trueup.rewards.math_answers import MathAnswers
from trueup.rewards.parameters import column_of, made_from
from trueup.rewards.samples import text_of

MATCH_SECONDS = 5.0
"""How long a pattern may take on one text."""

THINK = r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*(?!</?think>)\S(?:(?!</?think>).)*"
"""One block of thoughts at the start, and an answer behind it."""


@dataclass(frozen=True)
class Exact:
    """1 if the completion is the answer in ``column``, white space at the ends left out, else 0; None without answer.

    ``after``: only what follows the last occurrence of this counts, on both sides where it occurs, and a completion
    without it is wrong. ``ignore_case``: letters of either case are the same.
    """

    column: str = "answer"
    after: str = ""
    ignore_case: bool = False

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = column_of(columns, self.column, "exact")
        return [
            None if answer is None else float(self._said(text_of(completion)) == self._said(str(answer), given=True))
            for completion, answer in zip(completions, answers, strict=True)
        ]

    def _said(self, text: str, *, given: bool = False) -> str | None:
        _, found, behind = text.rpartition(self.after) if self.after else ("", "x", text)
        if not found and not given:
            return None
        text = (behind if found else text).strip()
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True)
class Pattern:
    """1 if the pattern is found in the completion (``whole``: if it is all of it), else 0; ``.`` is any character.

    Raises ``SettingsError`` for a pattern that can't be read, and when called ``TimeoutError`` for a text that it
    takes more than ``MATCH_SECONDS`` on.
    """

    pattern: str
    whole: bool = False

    def __post_init__(self) -> None:
        try:
            regex.compile(self.pattern, regex.DOTALL)
        except regex.error as error:
            raise SettingsError(f"{self.pattern!r} is no regular expression: {error}", where="--reward") from error

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        match = regex.fullmatch if self.whole else regex.search
        found = partial(match, self.pattern, flags=regex.DOTALL, timeout=MATCH_SECONDS, concurrent=True)
        return [float(found(text_of(completion)) is not None) for completion in completions]


@dataclass(frozen=True)
class Length:
    """−|T − target| / target, of the number of tokens T, end token included."""

    target: int

    def __post_init__(self) -> None:
        if self.target < 1:
            raise SettingsError(f"target={self.target} is out of range", where="--reward length")

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        return [-abs(len(tokens) - self.target) / self.target for tokens in completion_ids]


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft overlong punishment of a completion of T tokens, end token included.

        0                                       T ≤ max_length − buffer
        ((max_length − buffer) − T) / buffer    max_length − buffer < T ≤ max_length
        −1                                      max_length < T

    ``buffer`` 0 leaves out the slope. To be added to another reward. Source: Yu et al. 2025 (arXiv 2503.14476), eq. 13,
    where max_length is 20480 and the buffer ("cache") 4096.
    """

    max_length: int
    buffer: int

    def __post_init__(self) -> None:
        if not 0 <= self.buffer <= self.max_length:
            raise SettingsError(
                f"buffer={self.buffer} with max_length={self.max_length}",
                where="--reward overlong",
                way_out="0 ≤ buffer ≤ max_length",
            )

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        return [self.penalty(len(tokens)) for tokens in completion_ids]

    def penalty(self, length: int) -> float:
        free = self.max_length - self.buffer
        if length <= free:
            return 0.0
        return (free - length) / self.buffer if length <= self.max_length else -1.0


@dataclass(frozen=True)
class Sentiment:
    """VADER's compound sentiment of the completion, in [−1, 1]: made for English, of a few sentences.

    Raises ``MissingExtraError``. Source: Hutto and Gilbert 2014 (ICWSM), as in the package vaderSentiment.
    """

    @cached_property
    def _analyzer(self) -> Any:
        return require_extra("vaderSentiment.vaderSentiment", "sentiment").SentimentIntensityAnalyzer()

    def __post_init__(self) -> None:
        _ = self._analyzer

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [self._analyzer.polarity_scores(text_of(completion))["compound"] for completion in completions]


def built_in(name: str, cls: type[Any]) -> Callable[[str], RewardFunction]:
    return lambda parameters: made_from(cls, parameters, name)


BUILT_IN: Mapping[str, Callable[[str], RewardFunction]] = {
    "exact": built_in("exact", Exact),
    "regex": lambda pattern: Pattern(needed(pattern)),
    "format": lambda pattern: Pattern(pattern or THINK, whole=True),
    "length": built_in("length", Length),
    "overlong": built_in("overlong", Overlong),
    "sentiment": built_in("sentiment", Sentiment),
    "math": built_in("math", MathAnswers),
    "code": built_in("code", CodeTests),
    "reasoning-gym": built_in("reasoning-gym", ReasoningGym),
}
"""``NAME:PARAMETERS`` → the function. Each raises ``SettingsError`` for parameters that it doesn't have."""


def needed(pattern: str) -> str:
    if not pattern:
        raise SettingsError("needs a pattern", where="--reward regex", way_out=r"--reward 'regex:\d+'")
    return pattern
