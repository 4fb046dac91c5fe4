from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trueup.runs.statistics import (
    accuracy_by_length_gap,
    accuracy_interval,
    accuracy_metrics,
    calibration_metrics,
    comparison_tables,
    confidences,
    length_matched_accuracy,
    pair_outcomes,
    reliability,
)

# --- accuracy_interval


def test_wilson_by_hand():
    """8 of 10 at 95 %, worked with z = 1.959964: centre (0.8 + 0.19207) / 1.38415, half-width 0.22662."""
    mean, low, high = accuracy_interval([1] * 8 + [0] * 2)
    assert mean == 0.8
    assert low == pytest.approx(0.4901625, abs=1e-6)
    assert high == pytest.approx(0.9433178, abs=1e-6)


@given(st.integers(1, 400), st.data(), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_wilson_is_scipys(count, data, level):
    wins = data.draw(st.integers(0, count))
    mean, low, high = accuracy_interval([1] * wins + [0] * (count - wins), level)
    expected = stats.binomtest(wins, count).proportion_ci(level, method="wilson")
    assert mean == wins / count
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= mean <= high <= 1


def test_a_tie_is_half_a_win_and_half_a_loss():
    assert accuracy_interval([0.5] * 20 + [1] * 20) == accuracy_interval([1, 0] * 10 + [1] * 20)


@pytest.mark.parametrize("bad", [[], [1.5], [-0.1], [math.nan], [[0, 1]]])
def test_what_is_no_list_of_outcomes_is_refused(bad):
    with pytest.raises(ValueError, match="outcome"):
        accuracy_interval(bad)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_the_level_is_a_share(level):
    with pytest.raises(ValueError, match="level"):
        accuracy_interval([1, 0], level)


def covered(truth: float, intervals: list[tuple[float, float, float]]) -> float:
    return float(np.mean([low <= truth <= high for _, low, high in intervals]))


NUM_SIMULATIONS = 1000
FOUR_STANDARD_ERRORS = 4 * math.sqrt(0.95 * 0.05 / NUM_SIMULATIONS)


@pytest.mark.parametrize("truth", [0.5, 0.62, 0.9])
def test_the_interval_covers_as_often_as_it_says(truth):
    """The probability that it covers, summed over all 701 counts. Counts are whole, so 95 % is not met exactly."""
    count = 700
    intervals = [accuracy_interval([1] * wins + [0] * (count - wins)) for wins in range(count + 1)]
    inside = np.array([low <= truth <= high for _, low, high in intervals])
    assert stats.binom.pmf(np.arange(count + 1), count, truth)[inside].sum() == pytest.approx(0.95, abs=0.01)


def test_with_ties_it_covers_at_least_as_often():
    rng = np.random.default_rng(12)
    intervals = [accuracy_interval(rng.choice([0, 0.5, 1], 300, p=[0.2, 0.4, 0.4])) for _ in range(NUM_SIMULATIONS)]
    assert covered(0.6, intervals) > 0.95


# --- length_matched_accuracy

gaps_of_both_signs = st.lists(st.integers(-300, 300), min_size=2, max_size=200).filter(
    lambda gaps: min(gaps) < 0 < max(gaps)
)


def longer_rule(gaps: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.sign(gaps))


@given(gaps_of_both_signs)
def test_the_longer_answer_rule_scores_exactly_half(gaps):
    gaps = np.asarray(gaps)
    for outcomes in (longer_rule(gaps), 1 - longer_rule(gaps)):
        mean, low, high = length_matched_accuracy(outcomes, gaps)
        assert mean == pytest.approx(0.5, abs=1e-12)
        assert low <= mean <= high


def test_the_longer_answer_rule_wins_plainly_and_nothing_matched():
    rng = np.random.default_rng(3)
    gaps = rng.normal(40, 80, 700).round()
    assert accuracy_interval(longer_rule(gaps))[1] > 0.6
    assert length_matched_accuracy(longer_rule(gaps), gaps)[0] == pytest.approx(0.5, abs=1e-12)


@given(gaps_of_both_signs, st.sampled_from([0.0, 0.5, 1.0]))
def test_constant_outcomes_come_back(gaps, outcome):
    mean, low, high = length_matched_accuracy([outcome] * len(gaps), gaps)
    assert mean == pytest.approx(outcome, abs=1e-12)
    assert 0 <= low <= high <= 1
    assert high - low > 0


@given(gaps_of_both_signs, st.randoms(use_true_random=False))
def test_order_and_unit_don_t_matter(gaps, random):
    outcomes = [random.choice([0, 0.5, 1]) for _ in gaps]
    expected = length_matched_accuracy(outcomes, gaps)
    pairs = list(zip(outcomes, gaps, strict=True))
    random.shuffle(pairs)
    shuffled = length_matched_accuracy([y for y, _ in pairs], [4 * gap for _, gap in pairs])
    assert shuffled == pytest.approx(expected, abs=1e-12)


def test_swapping_who_is_longer_changes_nothing():
    rng = np.random.default_rng(4)
    gaps, outcomes = rng.normal(20, 50, 500), rng.integers(0, 2, 500)
    assert length_matched_accuracy(outcomes, gaps) == pytest.approx(length_matched_accuracy(outcomes, -gaps), abs=1e-12)


def test_one_stratum_by_hand():
    """Six longer with 5 right, two shorter with 1 right, one of equal length, right: 8/9·½(5/6 + 1/2) + 1/9."""
    outcomes = [1, 1, 1, 1, 1, 0, 1, 0, 1]
    gaps = [10] * 6 + [-10] * 2 + [0]
    assert length_matched_accuracy(outcomes, gaps)[0] == pytest.approx(8 / 9 * 0.5 * (5 / 6 + 1 / 2) + 1 / 9)


def test_without_differences_in_length_it_is_the_accuracy():
    mean, low, high = length_matched_accuracy([1, 0, 1, 1] * 50, [0] * 200)
    plain = accuracy_interval([1, 0, 1, 1] * 50)
    assert mean == plain[0]
    assert (low, high) == pytest.approx(plain[1:], abs=2e-3)


def test_nothing_to_match_is_nan():
    assert all(math.isnan(value) for value in length_matched_accuracy([1, 0, 1], [3, 5, 0]))
    assert all(math.isnan(value) for value in length_matched_accuracy([1, 0, 1], [-3, -5, -1]))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="2 outcomes"):
        length_matched_accuracy([1, 0], [1, 2, -3])


@pytest.mark.parametrize(("right_if_longer", "right_if_shorter"), [(0.62, 0.62), (0.9, 0.3), (0.97, 0.93)], ids=str)
def test_the_matched_interval_covers_as_often_as_it_says(right_if_longer, right_if_shorter):
    """Lengths as in real preference data: six in ten chosen answers are longer, the more the longer they are."""
    rng = np.random.default_rng(13)
    truth = (right_if_longer + right_if_shorter) / 2
    intervals = []
    for _ in range(NUM_SIMULATIONS):
        gaps = np.where(rng.random(700) < 0.6, 1, -1) * rng.geometric(1 / 60, 700)
        right = np.where(gaps > 0, right_if_longer, right_if_shorter)
        intervals.append(length_matched_accuracy(rng.random(700) < right, gaps))
    assert np.mean([mean for mean, _, _ in intervals]) == pytest.approx(truth, abs=0.002)
    # The smoothing of small cells may widen the interval a little, by no more than a point of coverage.
    assert 0.95 - FOUR_STANDARD_ERRORS < covered(truth, intervals) < 0.96 + FOUR_STANDARD_ERRORS


# --- pairs of one list

finite_gaps = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=120)


def list_pairs(rng: np.random.Generator, num_lists: int) -> tuple[np.ndarray, ...]:
    """Score gaps, length gaps and list numbers of all six pairs of lists of four, as a reward model would give them: an
    answer's error goes into each of its three pairs, and some lists are harder than others. Some have two answers."""
    noise = rng.choice([0.1, 3.0], size=(num_lists, 1))
    scores = np.sort(rng.normal(size=(num_lists, 4)))[:, ::-1] + noise * rng.normal(size=(num_lists, 4))
    lengths = rng.integers(5, 200, size=(num_lists, 4))
    better, worse = np.triu_indices(4, 1)
    kept = (rng.random(num_lists) < 0.7)[:, None] | ((better == 0) & (worse == 1))[None]
    index = np.broadcast_to(np.arange(num_lists)[:, None], kept.shape)
    return (scores[:, better] - scores[:, worse])[kept], (lengths[:, better] - lengths[:, worse])[kept], index[kept]


def test_a_design_effect_by_hand():
    """Two lists of two pairs, (1, 1) and (1, 0): p̂ = 3/4, residuals ¼, ¼, ¼, −¾.

    Between lists 2/1·(¼ + ¼) = 1, had they been independent 4/3·¾ = 1: deff = 1. With (1, 1) and (0, 0) in its place:
    2·(1 + 1) / (4/3·1) = 3, but two pairs a list can't count for less than one: 2.
    """
    assert accuracy_interval([1, 1, 1, 0], lists=[0, 0, 1, 1]) == pytest.approx(accuracy_interval([1, 1, 1, 0]))
    assert accuracy_interval([1, 1, 0, 0], lists=[0, 0, 1, 1]) == pytest.approx(accuracy_interval([1, 0]))


@given(finite_gaps)
def test_lists_of_one_pair_are_pairs(gaps):
    lengths = np.arange(len(gaps)) - len(gaps) // 2
    for lists in (np.arange(len(gaps)), [f"row {index}" for index in range(len(gaps))]):
        assert accuracy_metrics(pair_outcomes(gaps), lengths, lists) == pytest.approx(
            accuracy_metrics(pair_outcomes(gaps), lengths), nan_ok=True
        )
        assert calibration_metrics(gaps, lists) == calibration_metrics(gaps)
        assert comparison_tables(gaps, lengths, lists) == comparison_tables(gaps, lengths)


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_a_pair_tell_nothing_new(copies):
    """Each pair written several times, as one list: the interval is that of the pairs."""
    rng = np.random.default_rng(5)
    outcomes, gaps = rng.choice([0, 1], 200, p=[0.3, 0.7]), rng.normal(10, 30, 200)
    lists = np.repeat(np.arange(200), copies)
    many = np.repeat(outcomes, copies)
    assert accuracy_interval(many, lists=lists) == pytest.approx(accuracy_interval(outcomes), rel=1e-12)
    plain, copied = length_matched_accuracy(outcomes, gaps), length_matched_accuracy(many, np.repeat(gaps, copies))
    held = length_matched_accuracy(many, np.repeat(gaps, copies), lists=lists)
    assert held == pytest.approx(plain, rel=1e-12)
    assert copied[2] - copied[1] < 0.8 * (plain[2] - plain[1])


def test_all_right_counts_lists_not_pairs():
    lists = np.repeat(np.arange(30), 6)
    assert accuracy_interval([1] * 180, lists=lists) == pytest.approx(accuracy_interval([1] * 30))
    assert accuracy_interval([1, 0, 1], lists=[7, 7, 7]) == pytest.approx((2 / 3, *_wilson_ends(2 / 3, 1.0)))


def _wilson_ends(mean: float, count: float) -> tuple[float, float]:
    z = stats.norm.ppf(0.975)
    half = z * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return tuple((mean + z**2 / (2 * count) + sign * half) / (1 + z**2 / count) for sign in (-1, 1))


def test_intervals_of_lists_cover_as_often_as_they_say():
    """Of the accuracy, plain and length-matched; counted as independent, pairs of lists would promise too much."""
    rng = np.random.default_rng(14)
    truth = pair_outcomes(list_pairs(rng, 200_000)[0]).mean()
    plain, matched, naive = [], [], []
    for _ in range(NUM_SIMULATIONS):
        gaps, lengths, lists = list_pairs(rng, 120)
        outcomes = pair_outcomes(gaps)
        plain.append(accuracy_interval(outcomes, lists=lists))
        matched.append(length_matched_accuracy(outcomes, lengths, lists=lists))
        naive.append(accuracy_interval(outcomes))
    assert 0.95 - FOUR_STANDARD_ERRORS < covered(truth, plain) < 0.96 + FOUR_STANDARD_ERRORS
    assert 0.95 - FOUR_STANDARD_ERRORS < covered(truth, matched) < 0.96 + FOUR_STANDARD_ERRORS
    assert covered(truth, naive) < 0.86


def test_lists_have_the_shape_of_the_outcomes():
    with pytest.raises(ValueError, match="lists of shape"):
        accuracy_interval([1, 0], lists=[1])


# --- by length gap


def test_strata_of_the_length_gap_by_hand():
    outcomes = [0, 0, 1, 0, 0.5, 1, 1, 1]
    gaps = [-40, -30, -3, -2, 0, 2, 50, 60]
    table = accuracy_by_length_gap(outcomes, gaps, num_strata=4)
    assert [(each.shortest_gap, each.longest_gap, each.count, each.accuracy) for each in table] == [
        (-40, -30, 2, 0.0),
        (-3, -2, 2, 0.5),
        (0, 2, 2, 0.75),
        (50, 60, 2, 1.0),
    ]
    for pair, each in enumerate(table):
        assert (each.accuracy, each.low, each.high) == accuracy_interval(outcomes[2 * pair : 2 * pair + 2])


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=80), st.integers(1, 9))
def test_strata_hold_every_pair_once_and_equal_gaps_together(gaps, num_strata):
    table = accuracy_by_length_gap([1] * len(gaps), gaps, num_strata)
    assert sum(each.count for each in table) == len(gaps)
    assert 1 <= len(table) <= num_strata
    assert all(each.shortest_gap <= each.longest_gap for each in table)
    assert all(below.longest_gap < above.shortest_gap for below, above in pairwise(table))


# --- calibration


def test_a_reliability_diagram_by_hand():
    """Bins (0.2, 0.4) with 0 of 2 and (0.6, 0.8) with 1½ of 2: ½·|0 − 0.3| + ½·|0.75 − 0.7| = 0.175.

    By chance: ½·√(2/π·(0.16 + 0.24)/4) in either bin.
    """
    curve = reliability([0.2, 0.8, 0.4, 0.6], [0, 1, 0, 0.5], num_bins=2)
    assert curve.calibration_error == pytest.approx(0.175)
    assert curve.by_chance == pytest.approx(math.sqrt(2 / math.pi * 0.1))
    assert [(each.predicted, each.observed, each.count) for each in curve.bins] == [
        (pytest.approx(0.3), 0.0, 2),
        (pytest.approx(0.7), 0.75, 2),
    ]
    assert (curve.bins[1].low, curve.bins[1].high) == accuracy_interval([1, 0.5])[1:]


@given(finite_gaps, st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_order_of_predictions_does_not_matter(gaps, num_bins, random):
    pairs = list(zip(*confidences(gaps), strict=True))
    curve = reliability(*zip(*pairs, strict=True), num_bins=num_bins)
    random.shuffle(pairs)
    assert reliability(*zip(*pairs, strict=True), num_bins=num_bins).calibration_error == pytest.approx(
        curve.calibration_error
    )
    assert sum(each.count for each in curve.bins) == len(gaps)


@given(st.lists(st.floats(0.01, 8), min_size=4, max_size=60, unique=True), st.integers(1, 6), st.randoms())
def test_folding_is_the_upper_half_of_both_orders(sizes, num_bins, random):
    """Every pair taken in both orders gives a diagram that is its own mirror image, with the same error."""
    gaps = np.array([random.choice([-1, 1]) * size for size in sizes])
    folded = reliability(*confidences(gaps), num_bins=num_bins)
    p = 1 / (1 + np.exp(-gaps))
    both = reliability(np.r_[p, 1 - p], np.r_[np.ones_like(p), np.zeros_like(p)], num_bins=2 * num_bins)
    upper = [each for each in both.bins if each.predicted > 0.5]
    if len(gaps) % num_bins == 0:  # otherwise the quantiles of the two differ
        assert [each.count for each in upper] == [each.count for each in folded.bins]
        assert both.calibration_error == pytest.approx(folded.calibration_error)
        assert [each.observed for each in upper] == pytest.approx([each.observed for each in folded.bins])


def test_unfolded_the_diagram_says_nothing():
    """A model that guesses with great confidence: against p itself it looks as right as one that knows."""
    rng = np.random.default_rng(6)
    gaps = 5 * rng.choice([-1, 1], 1000)
    assert [each.observed for each in reliability(1 / (1 + np.exp(-gaps)), np.ones(1000)).bins] == [1.0, 1.0]
    assert calibration_metrics(gaps)["ece"] == pytest.approx(0.49, abs=0.04)


@pytest.mark.parametrize("lists_of_four", [False, True])
def test_a_calibrated_model_shows_the_error_of_chance(lists_of_four):
    """Outcomes drawn from the predictions; in lists, all pairs of a list alike."""
    rng = np.random.default_rng(7)
    found, promised = [], []
    for _ in range(400):
        if lists_of_four:
            sure, lists = np.repeat(0.5 + 0.5 * rng.random(100), 4), np.repeat(np.arange(100), 4)
            right = np.repeat(rng.random(100), 4) < sure
        else:
            sure, lists = 0.5 + 0.5 * rng.random(400), None
            right = rng.random(400) < sure
        curve = reliability(sure, right, lists=lists)
        found.append(curve.calibration_error)
        promised.append(curve.by_chance)
    assert np.mean(promised) == pytest.approx(np.mean(found), rel=0.06)


def test_confidence_that_is_off_is_found():
    """Scores that are twice too far apart: the error is the mean of |σ(2d) − σ(d)|."""
    rng = np.random.default_rng(8)
    sizes = rng.exponential(1.5, 40_000)
    gaps = np.where(rng.random(40_000) < 1 / (1 + np.exp(-sizes)), sizes, -sizes)
    assert calibration_metrics(gaps)["ece"] < 0.01
    assert calibration_metrics(2 * gaps)["ece"] == pytest.approx(
        (1 / (1 + np.exp(-2 * sizes)) - 1 / (1 + np.exp(-sizes))).mean(), abs=0.005
    )
    assert calibration_metrics(gaps)["brier"] < calibration_metrics(2 * gaps)["brier"]
    assert calibration_metrics(gaps)["log_loss"] < calibration_metrics(2 * gaps)["log_loss"]


def test_proper_scores_by_hand():
    """Gaps 0, log 3 and −log 3: p = ½, ¾, ¼."""
    found = calibration_metrics([0.0, math.log(3), -math.log(3)])
    assert found["brier"] == pytest.approx((1 / 4 + 1 / 16 + 9 / 16) / 3)
    assert found["log_loss"] == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3)


def test_far_apart_scores_overflow_nothing():
    found = calibration_metrics([800.0, -800.0])
    assert found == {"ece": 0.5, "ece_by_chance": 0.0, "brier": 0.5, "log_loss": 400.0}


def test_tables_are_plain_records():
    tables = comparison_tables([1.0, -1.0, 2.0], [3, -4, 0], [0, 0, 1])
    assert json.loads(json.dumps(tables)) == tables
    assert sum(row["count"] for row in tables["reliability"]) == sum(row["count"] for row in tables["length_gaps"]) == 3


@pytest.mark.parametrize("bad", [[1.2, 0.5], [math.nan, 0.5], [0.5]])
def test_what_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError, match="probabilities"):
        reliability(bad, [1, 0])


def test_there_is_at_least_one_bin():
    with pytest.raises(ValueError, match="at least one bin"):
        reliability([0.5], [1], num_bins=0)
