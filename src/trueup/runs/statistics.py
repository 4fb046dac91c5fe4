"""What held-out comparisons say of a model: accuracy, accuracy that a preference for length can't earn, calibration.

Pairs that come from one ranked list of K > 2 answers are not independent: an answer that a model takes for too good
spoils several pairs at once. So every function takes ``lists``, which list each pair is of, and its intervals count
lists, not pairs. Without it every pair stands for itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_NUM_STRATA = 10
_MIN_CELL = 5

# ------------------------------------------------------------------------------------------------------- accuracy


def accuracy_interval(
    outcomes: ArrayLike, level: float = 0.95, lists: ArrayLike | None = None
) -> tuple[float, float, float]:
    """Mean of the outcomes and its Wilson score interval.

    With p̂ the mean of n outcomes (1 right, 0 wrong, ½ a tie) and z the normal quantile of (1 + level)/2,

        (p̂ + z²/2n ± z·√(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n)

    A tie counts as half a success. Outcomes in [0, 1] with mean p have at most the variance p(1 − p) of outcomes
    without ties, so with ties the interval is on the safe (wide) side.

    With ``lists`` the mean is a ratio, right pairs of all lists over pairs of all lists, and n is the number of
    independent outcomes that would have its variance, N / deff. The design effect sets the variance between lists
    c = 1 … C beside the one that N independent pairs would have, with e_i = y_i − p̂:

        deff = C/(C − 1) · Σ_c (Σ_{i∈c} e_i)²  /  (N/(N − 1) · Σ_i e_i²)

    held between 1 (pairs are independent) and Σ_c n_c²/N (all pairs of a list come out alike), which is also taken
    where nothing can be measured: one list, or equal outcomes everywhere. Lists of one pair each give deff = 1.

    ``outcomes``: [N], each in [0, 1]; ``lists``: [N], equal for pairs of one list. Returns (mean, low, high). Raises
    ``ValueError`` for no outcomes, for one outside [0, 1], for unequal shapes and for a level outside (0, 1).
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference"; design effect and
    effective sample size: Kish 1965, "Survey Sampling"; ratio estimator: Cochran 1977, "Sampling Techniques", ch. 6.
    """
    outcomes = _checked(outcomes)
    mean = float(outcomes.mean())
    effect = _design_effect(outcomes - mean, np.ones_like(outcomes), _list_index(lists, outcomes))
    return wilson(mean, len(outcomes) / effect, level)


def length_matched_accuracy(
    outcomes: ArrayLike, length_gaps: ArrayLike, level: float = 0.95, lists: ArrayLike | None = None
) -> tuple[float, float, float]:
    """The accuracy, were the better answer the longer one half the time at every difference in length.

    Pairs are cut into strata h of similar |gap| (at most 10, by quantiles, each with both kinds of pairs: chosen
    longer, +, and chosen shorter, −; at least 5 of each where there are as many). Inside a stratum both kinds weigh the
    same, strata weigh by their pairs; pairs of equal length form a stratum of one kind:

        Â = Σ_h (n_h/n) · ½·(ȳ_h⁺ + ȳ_h⁻)  [+ (n_0/n)·ȳ_0]

    So the rule "the longer answer is better" scores exactly ½, and so does "the shorter". The variance is that of a
    stratified mean, Σ_c w_c²·v_c/n_c over the cells c = (h, ±) with weights w_c, where v_c = p̃(1 − p̃)·n_c/(n_c − 1),
    p̃ = (Σy + ½)/(n_c + 1) keeps a cell of equal outcomes from counting as certain; the interval is Wilson's at the
    number of outcomes that would have this variance, ñ = Ã(1 − Ã)/Var with Ã = Σ_c w_c·p̃_c. With ``lists`` the variance
    grows by the design effect of ``accuracy_interval``, each pair's residual y_i − ȳ_c weighing w_c/n_c, and every 1, ½
    and 5 above is that many lists of average size.

    ``outcomes``: [N], each in [0, 1]. ``length_gaps``: [N], length of chosen minus length of rejected, in any unit.
    ``lists``: [N]. Returns (mean, low, high); three NaN where pairs differ in length but the longer answer is chosen in
    all of them, or in none: nothing can be matched then. Raises ``ValueError`` as ``accuracy_interval`` does.
    Source: stratified estimation as in Cochran 1977, "Sampling Techniques", ch. 5; Wilson 1927.
    """
    outcomes = _checked(outcomes)
    gaps, index = _same_shape("length gaps", length_gaps, outcomes), _list_index(lists, outcomes)
    if not _matchable(gaps):
        return math.nan, math.nan, math.nan
    mean = smoothed_mean = variance = 0.0
    residuals, weights = np.empty_like(outcomes), np.empty_like(outcomes)
    pairs = len(index) / len(np.unique(index))  # of a list, on average
    for weight, members in _cells(gaps, math.ceil(_MIN_CELL * pairs)):
        cell, count = outcomes[members], len(members)
        smoothed = (cell.sum() + 0.5 * pairs) / (count + pairs)
        mean += weight * cell.mean()
        smoothed_mean += weight * smoothed
        variance += weight**2 * smoothed * (1 - smoothed) / max(count - pairs, pairs)
        residuals[members], weights[members] = cell - cell.mean(), weight / count
    variance *= _design_effect(residuals, weights, index)
    return wilson(float(mean), smoothed_mean * (1 - smoothed_mean) / variance, level)


@dataclass(frozen=True, slots=True)
class LengthStratum:
    """The pairs whose length gap, better minus worse side, lies from ``shortest_gap`` to ``longest_gap``."""

    shortest_gap: float
    longest_gap: float
    count: int
    accuracy: float
    low: float
    high: float


def accuracy_by_length_gap(
    outcomes: ArrayLike,
    length_gaps: ArrayLike,
    num_strata: int = 5,
    level: float = 0.95,
    lists: ArrayLike | None = None,
) -> tuple[LengthStratum, ...]:
    """Accuracy where the better side is much shorter, … , about as long, … , much longer.

    Pairs are cut at the quantiles of the signed gap into strata of about as many pairs each; equal gaps stay together,
    so there may be fewer than ``num_strata``. A model that measures length is right at one end and wrong at the other.

    ``outcomes``, ``length_gaps``, ``lists``: [N], as in ``length_matched_accuracy``; the intervals are those of
    ``accuracy_interval``. Raises ``ValueError`` as these do, and for fewer than one stratum.
    """
    outcomes = _checked(outcomes)
    gaps, index = _same_shape("length gaps", length_gaps, outcomes), _list_index(lists, outcomes)
    return tuple(
        LengthStratum(
            float(gaps[stratum].min()),
            float(gaps[stratum].max()),
            len(stratum),
            *accuracy_interval(outcomes[stratum], level, index[stratum]),
        )
        for stratum in _quantile_bins(gaps, num_strata)
    )


def accuracy_metrics(
    outcomes: ArrayLike, length_gaps: ArrayLike, lists: ArrayLike | None = None, *, name: str = "accuracy"
) -> dict[str, float]:
    """Three accuracies, each with the ends of its 95 % interval (``…_low``, ``…_high``).

    ``name``: the plain one; ``name_length_matched``; ``name_longer_answer``, of the rule that calls the longer answer
    better. Arguments as in ``length_matched_accuracy``.
    """
    outcomes = _checked(outcomes)
    gaps = _same_shape("length gaps", length_gaps, outcomes)
    metrics = {}
    for named, interval in (
        (name, accuracy_interval(outcomes, lists=lists)),
        (f"{name}_length_matched", length_matched_accuracy(outcomes, gaps, lists=lists)),
        (f"{name}_longer_answer", accuracy_interval(pair_outcomes(gaps), lists=lists)),
    ):
        metrics |= dict(zip((named, f"{named}_low", f"{named}_high"), interval, strict=True))
    return metrics


# ---------------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Predictions of about the same probability: their mean, and how often they came true, with its interval."""

    predicted: float
    observed: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Reliability:
    """A reliability diagram's data, and the expected calibration error over its bins.

    ``by_chance``: the error that a perfectly calibrated model would show on as many outcomes, since a mean of few
    outcomes is never the probability itself. Only what lies clearly above it speaks against the model.
    """

    bins: tuple[ReliabilityBin, ...]
    calibration_error: float
    by_chance: float


def reliability(
    probabilities: ArrayLike,
    outcomes: ArrayLike,
    num_bins: int = 10,
    level: float = 0.95,
    lists: ArrayLike | None = None,
) -> Reliability:
    """Do things come true as often as predicted?

        ECE = Σ_b (n_b/N) · |ȳ_b − p̄_b|

    over bins b of about as many predictions each, with mean prediction p̄_b and mean outcome ȳ_b. Bins of equal mass
    have no nearly empty bin, whose noise would count as miscalibration; equal predictions stay in one bin, so there may
    be fewer than ``num_bins``. ``by_chance`` is the mean of the same sum if outcomes were drawn from the predictions,
    E|ȳ_b − p̄_b| = √(2v_b/π) with v_b = Σ_{i∈b} p_i(1 − p_i)/n_b² times the design effect.

    ``probabilities``, ``outcomes`` (0, 1, or ½ for a tie), ``lists``: [N]. Of pairs, fold them first: see
    ``confidences``. Raises ``ValueError`` as ``accuracy_interval`` does, and for fewer than one bin.
    Source: Naeini et al. 2015 (AAAI); Guo et al. 2017 (arXiv 1706.04599), equation 3, there with bins of equal width.
    """
    outcomes = _checked(outcomes)
    predicted = _checked(_same_shape("probabilities", probabilities, outcomes), "probabilities")
    index = _list_index(lists, outcomes)
    bins, error, by_chance = [], 0.0, 0.0
    for members in _quantile_bins(predicted, num_bins):
        chances, came, count = predicted[members], outcomes[members], len(members)
        observed, low, high = accuracy_interval(came, level, index[members])
        bins.append(ReliabilityBin(float(chances.mean()), observed, low, high, count))
        share = count / len(outcomes)
        error += share * abs(observed - bins[-1].predicted)
        variance = (chances * (1 - chances)).sum() / count**2
        variance *= _design_effect(came - chances, np.ones(count), index[members])
        by_chance += share * math.sqrt(2 * variance / math.pi)
    return Reliability(tuple(bins), float(error), float(by_chance))


def confidences(score_gaps: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """How sure the model is of the side it prefers, and whether that is the better side: ([N], [N]).

        c = max(p, 1 − p) = σ(|s_w − s_l|),      1 if s_w > s_l, 0 if s_w < s_l, ½ if they are equal

    p = σ(s_w − s_l) is the model's probability of what people chose, and people chose it in every pair: against p every
    outcome is 1, and the diagram would be a flat line that says nothing. Which side is listed first is the data's
    doing, not the model's. Folding asks what the model itself claims, "this side, with confidence c". It is the same
    as taking every pair in both orders, (p, 1) and (1 − p, 0): that diagram is its own mirror image around ½, and this
    is its upper half, with the same calibration error.

    ``score_gaps``: [N], score of the better minus score of the worse side.
    """
    gaps = np.asarray(score_gaps, dtype=np.float64)
    return 1 / (1 + np.exp(-np.abs(gaps))), pair_outcomes(gaps)


def calibration_metrics(score_gaps: ArrayLike, lists: ArrayLike | None = None) -> dict[str, float]:
    """Whether the probabilities p = σ(s_w − s_l) that a score implies are what people do; lower is better in all.

    ``ece`` and ``ece_by_chance`` as in ``reliability``, over ``confidences``; and two proper scores, which charge for
    wrong order and wrong confidence together, at 50 : 50 equal to ¼ and log 2:

        brier = mean (1 − p)²,      log_loss = mean −log p

    ``score_gaps``, ``lists``: [N]. Source: Brier 1950 (of the outcome that came true, one of two).
    """
    gaps = np.asarray(score_gaps, dtype=np.float64)
    sure, right = confidences(gaps)
    curve = reliability(sure, right, lists=lists)
    losses = np.logaddexp(0.0, -gaps)
    return {
        "ece": curve.calibration_error,
        "ece_by_chance": curve.by_chance,
        "brier": float((np.expm1(-losses) ** 2).mean()),
        "log_loss": float(losses.mean()),
    }


def comparison_tables(
    score_gaps: ArrayLike, length_gaps: ArrayLike, lists: ArrayLike | None = None
) -> dict[str, list[dict[str, Any]]]:
    """What stands behind the figures, as plain records: ``reliability`` bins and ``length_gaps`` strata."""
    sure, right = confidences(score_gaps)
    return {
        "reliability": [asdict(each) for each in reliability(sure, right, lists=lists).bins],
        "length_gaps": [
            asdict(each) for each in accuracy_by_length_gap(pair_outcomes(score_gaps), length_gaps, lists=lists)
        ],
    }


def pair_outcomes(gaps: ArrayLike) -> np.ndarray:
    """1 where the gap is positive, 0 where it is negative, ½ at a tie: [N]."""
    return 0.5 * (1 + np.sign(np.asarray(gaps, dtype=np.float64)))


# ---------------------------------------------------------------------------------------------------------- parts


def _design_effect(residuals: np.ndarray, weights: np.ndarray, index: np.ndarray) -> float:
    """How many times larger the variance of Σ w·y is because outcomes of one list go together (``accuracy_interval``,
    there with w = 1)."""
    num_lists, count = len(np.unique(index)), len(index)
    if num_lists == count:
        return 1.0
    parts = weights * residuals
    apart, most = float((parts**2).sum()), _square_of_sums(weights, index) / float((weights**2).sum())
    if num_lists == 1 or apart == 0:
        return most
    together = _square_of_sums(parts, index) * num_lists / (num_lists - 1)
    return min(max(1.0, together * (count - 1) / count / apart), most)


def _square_of_sums(values: np.ndarray, index: np.ndarray) -> float:
    return float((np.bincount(index, values) ** 2).sum())


def _list_index(lists: ArrayLike | None, outcomes: np.ndarray) -> np.ndarray:
    """Which list each outcome is of, as numbers from 0 on; each its own without ``lists``."""
    if lists is None:
        return np.arange(len(outcomes))
    names = np.asarray(lists)
    if names.shape != outcomes.shape:
        raise ValueError(f"{len(outcomes)} outcomes, but lists of shape {names.shape}")
    return np.unique(names, return_inverse=True)[1]


def _quantile_bins(values: np.ndarray, num_bins: int) -> list[np.ndarray]:
    """Indices of ``values`` in bins cut at their quantiles, lowest first; equal values share a bin, none is empty."""
    if num_bins < 1:
        raise ValueError(f"there must be at least one bin, not {num_bins}")
    edges = np.unique(np.quantile(values, np.linspace(0, 1, num_bins + 1)[1:-1]))
    bins = np.searchsorted(edges, values, side="right")
    return [np.flatnonzero(bins == index) for index in np.unique(bins)]


def _matchable(gaps: np.ndarray) -> bool:
    return bool((gaps > 0).any() == (gaps < 0).any())


def _cells(gaps: np.ndarray, min_cell: int) -> list[tuple[float, np.ndarray]]:
    """The cells' weights, which sum to 1, and the indices of their pairs."""
    cells = []
    if (same := gaps == 0).any():
        cells.append((float(same.mean()), np.flatnonzero(same)))
    for stratum in _strata(gaps, min_cell):
        weight = len(stratum) / len(gaps) / 2
        longer = gaps[stratum] > 0
        cells += [(weight, stratum[longer]), (weight, stratum[~longer])]
    return cells


def _strata(gaps: np.ndarray, min_cell: int) -> list[np.ndarray]:
    """Indices of the pairs that differ in length, in strata of similar |gap| with both signs in each."""
    differing = np.flatnonzero(gaps)
    if len(differing) == 0:
        return []
    num_longer = int((gaps > 0).sum())
    required = min(min_cell, num_longer, len(differing) - num_longer)
    strata: list[np.ndarray] = []
    open_stratum = np.empty(0, dtype=np.int64)
    for members in _quantile_bins(np.abs(gaps[differing]), _NUM_STRATA):
        open_stratum = np.concatenate([open_stratum, differing[members]])
        longer = int((gaps[open_stratum] > 0).sum())
        if min(longer, len(open_stratum) - longer) >= required:
            strata.append(open_stratum)
            open_stratum = np.empty(0, dtype=np.int64)
    if len(open_stratum):  # too one-sided to stand alone: it joins the stratum below it
        below = strata.pop() if strata else np.empty(0, dtype=np.int64)
        strata.append(np.concatenate([below, open_stratum]))
    return strata


def wilson(mean: float, count: float, level: float) -> tuple[float, float, float]:
    """(mean, low, high): Wilson's interval for a mean of ``count`` independent outcomes, see ``accuracy_interval``."""
    if not 0 < level < 1:
        raise ValueError("the level must lie between 0 and 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z**2 / count
    centre = (mean + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    # At a mean of 0 or 1 one end is the mean itself, up to rounding.
    return mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))


def _checked(values: ArrayLike, what: str = "outcomes") -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{what} must be a list of at least one number, not of shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"all {what} must lie in [0, 1]")
    return values


def _same_shape(what: str, values: ArrayLike, outcomes: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.shape != outcomes.shape:
        raise ValueError(f"{len(outcomes)} outcomes, but {what} of shape {values.shape}")
    return values
