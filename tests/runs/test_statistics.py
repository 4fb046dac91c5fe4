from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trueup.runs.statistics import accuracy_interval, length_matched_accuracy

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
