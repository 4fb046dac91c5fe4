"""From the scores of K completions of one prompt to preferences: which is better than which.

Pure functions of scores, which are float64 [K] and finite; a pair is (index of the better, index of the worse).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Pair = tuple[int, int]
PairMaker = Callable[[np.ndarray, float, bool], list[Pair]]


def best_and_worst(scores: np.ndarray, min_gap: float = 0.0, keep_ties: bool = False) -> list[Pair]:
    """The highest score against the lowest, the first of each where several are equal.

    No pair where they are less than ``min_gap`` apart. Where all are equal none either; with ``keep_ties`` the first
    against the last, in both orders: together they are what a comparison that came out even says (a label of ½).
    """
    if len(scores) < 2:
        return []
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    if scores[best] == scores[worst]:
        return _both_orders(0, len(scores) - 1) if keep_ties else []
    return [(best, worst)] if scores[best] - scores[worst] >= min_gap else []


def all_pairs(scores: np.ndarray, min_gap: float = 0.0, keep_ties: bool = False) -> list[Pair]:
    """Every two completions whose scores differ, by at least ``min_gap``; with ``keep_ties`` equal ones in both orders.

    In the order of the better one, then of the worse. K completions give up to K(K − 1)/2 pairs, which are not
    independent of each other.
    """
    gaps = scores[:, None] - scores[None, :]
    better, worse = np.nonzero((gaps > 0) & (gaps >= min_gap))
    pairs = list(zip(better.tolist(), worse.tolist(), strict=True))
    if keep_ties:
        equal = zip(*(each.tolist() for each in np.nonzero(np.triu(gaps == 0, 1))), strict=True)
        pairs += [pair for one, other in equal for pair in _both_orders(one, other)]
    return pairs


def ranking(scores: np.ndarray, min_gap: float = 0.0) -> list[int]:
    """Completions from the best down, each at least ``min_gap`` below the one before it, of equal ones the first.

    What lies nearer is left out: the likelihoods of rankings know no ties.
    """
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        gap = scores[kept[-1]] - scores[index] if kept else np.inf
        if gap > 0 and gap >= min_gap:
            kept.append(index)
    return kept


PAIRS: dict[str, PairMaker] = {"best_worst": best_and_worst, "all": all_pairs}
"""The ways to make pairs, by the name of the setting."""


def distinct(completions: Sequence[object]) -> list[int]:
    """Indices of the completions without repetitions, the first of each: a completion is not better than itself."""
    return [index for index, each in enumerate(completions) if each not in completions[:index]]


def _both_orders(one: int, other: int) -> list[Pair]:
    return [(one, other), (other, one)]
