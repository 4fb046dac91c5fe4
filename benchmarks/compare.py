"""What the numbers of two sides say: whether they computed the same, how their times and memory compare.

Pure functions over plain records, standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step as a side reports it. ``grad_norm`` is the one before clipping; ``parts``: seconds by name."""

    step: int
    loss: float
    grad_norm: float
    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process of one side: its steps, and its memory in MiB after its imports and at its peak."""

    steps: tuple[Step, ...]
    imported_mib: float
    peak_mib: float

    def seconds(self, warmup_steps: int) -> float:
        """Mean seconds of the steps after the first ``warmup_steps``.

        The mean, because batches differ in length: every run makes the same steps, so their sums are comparable.
        """
        return fmean(step.seconds for step in self.steps[warmup_steps:])

    def parts(self, warmup_steps: int) -> dict[str, float]:
        """The same of each part that the steps name."""
        timed = self.steps[warmup_steps:]
        return {name: fmean(step.parts[name] for step in timed) for name in timed[0].parts}


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest relative difference at which a loss and a gradient norm count as the same."""

    loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The largest relative differences that were seen over the steps of two runs."""

    loss: float
    grad_norm: float

    def within(self, tolerance: Tolerance) -> bool:
        """False for NaN as well: a loss that isn't a number agrees with nothing."""
        return self.loss <= tolerance.loss and self.grad_norm <= tolerance.grad_norm

    @classmethod
    def worst(cls, seen: Sequence[Agreement]) -> Agreement:
        """The largest differences of several rounds."""
        return cls(loss=_largest([one.loss for one in seen]), grad_norm=_largest([one.grad_norm for one in seen]))


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, least and most of one number over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median=median(values), low=min(values), high=max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both sides over all rounds. ``ratio`` is the peer's time over ours, round by round: above 1, we are faster."""

    ours_seconds: Spread
    peer_seconds: Spread
    ratio: Spread
    ours_peak_mib: float
    peer_peak_mib: float


def relative_difference(a: float, b: float, *, scale: float = 0.0) -> float:
    """``|a − b| / max(|a|, |b|, scale)``, 0 where they are equal, NaN where one is not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.nan
    return abs(a - b) / max(abs(a), abs(b), scale) if a != b else 0.0


def agreement(ours: Run, peer: Run, *, loss_scale: float = 0.0) -> Agreement:
    """The largest differences over the steps of two runs. Raises ``ValueError`` where they made different steps.

    ``loss_scale``: the size of the terms that a loss is the sum of, where they may cancel.
    """
    if not ours.steps or [step.step for step in ours.steps] != [step.step for step in peer.steps]:
        raise ValueError("the two runs did not make the same steps")
    pairs = list(zip(ours.steps, peer.steps, strict=True))
    return Agreement(
        loss=_largest([relative_difference(a.loss, b.loss, scale=loss_scale) for a, b in pairs]),
        grad_norm=_largest([relative_difference(a.grad_norm, b.grad_norm) for a, b in pairs]),
    )


def _largest(values: Sequence[float]) -> float:
    """The maximum, or NaN if any is NaN (``max`` alone would depend on the order)."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def compare(ours: Sequence[Run], peer: Sequence[Run], *, warmup_steps: int) -> Comparison:
    """The rounds of both sides, the i-th of each taken right after one another. Raises ``ValueError`` if not paired."""
    our_seconds = [run.seconds(warmup_steps) for run in ours]
    peer_seconds = [run.seconds(warmup_steps) for run in peer]
    return Comparison(
        ours_seconds=Spread.of(our_seconds),
        peer_seconds=Spread.of(peer_seconds),
        ratio=Spread.of([b / a for a, b in zip(our_seconds, peer_seconds, strict=True)]),
        ours_peak_mib=max(run.peak_mib for run in ours),
        peer_peak_mib=max(run.peak_mib for run in peer),
    )


class Writing(NamedTuple):
    """Tokens that one side wrote, and the log-prob of each."""

    tokens: Sequence[int]
    logprobs: Sequence[float]


def written_apart(ours: Sequence[Writing], theirs: Sequence[Writing]) -> float:
    """The largest difference of a log-prob between two sides' most likely completions of the same prompts.

    A row is compared up to the first token in which it differs, that one included: if two tokens are equally likely
    either may be written, with the same log-prob, and what follows is of two texts. Raises ``ValueError`` where rows
    are missing or of other lengths.
    """
    differences = [0.0]
    for a, b in zip(ours, theirs, strict=True):
        for token, other, logprob, other_logprob in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=True):
            differences.append(abs(logprob - other_logprob))
            if token != other:
                break
    return _largest(differences)
