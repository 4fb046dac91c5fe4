"""Accuracies with intervals, and accuracy that a preference for length can't earn."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

_NUM_STRATA = 10
_MIN_CELL = 5


def accuracy_interval(outcomes: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of the outcomes and its Wilson score interval.

    With p̂ the mean of n outcomes (1 right, 0 wrong, ½ a tie) and z the normal quantile of (1 + level)/2,

        (p̂ + z²/2n ± z·√(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n)

    A tie counts as half a success. Outcomes in [0, 1] with mean p have at most the variance p(1 − p) of outcomes
    without ties, so with ties the interval is on the safe (wide) side.

    ``outcomes``: [N], each in [0, 1]. Returns (mean, low, high). Raises ``ValueError`` for no outcomes, for one outside
    [0, 1], and for a level outside (0, 1).
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    outcomes = _checked(outcomes)
    return _wilson(float(outcomes.mean()), len(outcomes), level)


def length_matched_accuracy(
    outcomes: ArrayLike, length_gaps: ArrayLike, level: float = 0.95
) -> tuple[float, float, float]:
    """The accuracy, were the better answer the longer one half the time at every difference in length.

    Pairs are cut into strata h of similar |gap| (at most 10, by quantiles, each with both kinds of pairs: chosen
    longer, +, and chosen shorter, −; at least 5 of each where there are as many). Inside a stratum both kinds weigh the
    same, strata weigh by their pairs; pairs of equal length form a stratum of one kind:

        Â = Σ_h (n_h/n) · ½·(ȳ_h⁺ + ȳ_h⁻)  [+ (n_0/n)·ȳ_0]

    So the rule "the longer answer is better" scores exactly ½, and so does "the shorter". The variance is that of a
    stratified mean, Σ_c w_c²·v_c/n_c over the cells c = (h, ±) with weights w_c, where v_c = p̃(1 − p̃)·n_c/(n_c − 1),
    p̃ = (Σy + ½)/(n_c + 1) keeps a cell of equal outcomes from counting as certain; the interval is Wilson's at the
    number of outcomes that would have this variance, ñ = Ã(1 − Ã)/Var with Ã = Σ_c w_c·p̃_c.

    ``outcomes``: [N], each in [0, 1]. ``length_gaps``: [N], length of chosen minus length of rejected, in any unit.
    Returns (mean, low, high); three NaN where pairs differ in length but the longer answer is chosen in all of them, or
    in none: nothing can be matched then. Raises ``ValueError`` as ``accuracy_interval`` does, and for unequal shapes.
    Source: stratified estimation as in Cochran 1977, "Sampling Techniques", ch. 5; Wilson 1927.
    """
    outcomes = _checked(outcomes)
    gaps = np.asarray(length_gaps, dtype=np.float64)
    if gaps.shape != outcomes.shape:
        raise ValueError(f"{len(outcomes)} outcomes, but length gaps of shape {gaps.shape}")
    if not _matchable(gaps):
        return math.nan, math.nan, math.nan
    mean = smoothed_mean = variance = 0.0
    for weight, cell in _cells(outcomes, gaps):
        count = len(cell)
        smoothed = (cell.sum() + 0.5) / (count + 1)
        mean += weight * cell.mean()
        smoothed_mean += weight * smoothed
        variance += weight**2 * smoothed * (1 - smoothed) / max(count - 1, 1)
    return _wilson(float(mean), smoothed_mean * (1 - smoothed_mean) / variance, level)


def _matchable(gaps: np.ndarray) -> bool:
    return bool((gaps > 0).any() == (gaps < 0).any())


def _cells(outcomes: np.ndarray, gaps: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """The cells' weights, which sum to 1, and their outcomes."""
    cells = []
    if (same := gaps == 0).any():
        cells.append((float(same.mean()), outcomes[same]))
    for stratum in _strata(gaps):
        weight = len(stratum) / len(gaps) / 2
        longer = gaps[stratum] > 0
        cells += [(weight, outcomes[stratum[longer]]), (weight, outcomes[stratum[~longer]])]
    return cells


def _strata(gaps: np.ndarray) -> list[np.ndarray]:
    """Indices of the pairs that differ in length, in strata of similar |gap| with both signs in each."""
    differing = np.flatnonzero(gaps)
    if len(differing) == 0:
        return []
    num_longer = int((gaps > 0).sum())
    required = min(_MIN_CELL, num_longer, len(differing) - num_longer)
    sizes = np.abs(gaps[differing])
    edges = np.unique(np.quantile(sizes, np.linspace(0, 1, _NUM_STRATA + 1)[1:-1]))
    bins = np.searchsorted(edges, sizes, side="right")
    strata: list[np.ndarray] = []
    open_stratum = np.empty(0, dtype=np.int64)
    for index in range(len(edges) + 1):
        open_stratum = np.concatenate([open_stratum, differing[bins == index]])
        longer = int((gaps[open_stratum] > 0).sum())
        if min(longer, len(open_stratum) - longer) >= required:
            strata.append(open_stratum)
            open_stratum = np.empty(0, dtype=np.int64)
    if len(open_stratum):  # too one-sided to stand alone: it joins the stratum below it
        below = strata.pop() if strata else np.empty(0, dtype=np.int64)
        strata.append(np.concatenate([below, open_stratum]))
    return strata


def _wilson(mean: float, count: float, level: float) -> tuple[float, float, float]:
    if not 0 < level < 1:
        raise ValueError("the level must lie between 0 and 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z**2 / count
    centre = (mean + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    # At a mean of 0 or 1 one end is the mean itself, up to rounding.
    return mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))


def _checked(outcomes: ArrayLike) -> np.ndarray:
    outcomes = np.asarray(outcomes, dtype=np.float64)
    if outcomes.ndim != 1 or len(outcomes) == 0:
        raise ValueError(f"outcomes must be a list of at least one number, not of shape {outcomes.shape}")
    if not ((outcomes >= 0) & (outcomes <= 1)).all():
        raise ValueError("every outcome must lie in [0, 1]")
    return outcomes
