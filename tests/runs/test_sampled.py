"""pass@k and means over prompts, held against enumeration and against coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from trueup.runs.sampled import mean_interval, pass_at_k, pass_at_k_interval, pass_at_k_metrics
from trueup.runs.statistics import accuracy_interval


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_choices_that_hold_a_correct_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        correct = [True] * c + [False] * (n - c)
        share = np.mean([any(choice) for choice in itertools.combinations(correct, k)])
        assert pass_at_k([n], [c], k)[0] == pytest.approx(share, rel=1e-14), (c, k)


@pytest.mark.parametrize("p", [0.0, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_unbiased(p, k):
    """Its mean over all outcomes of n samples is the probability itself; the plug-in estimate's is not."""
    n = 6
    counts = np.arange(n + 1)
    chances = stats.binom.pmf(counts, n, p)
    truth = 1 - (1 - p) ** k
    assert chances @ pass_at_k(np.full(n + 1, n), counts, k) == pytest.approx(truth, abs=1e-14)
    if k > 1 and 0 < p < 1:
        assert abs(chances @ (1 - (1 - counts / n) ** k) - truth) > 1e-3


def test_pass_at_k_with_many_samples():
    """Where binomial coefficients leave the range of floats, and where 1 − x would lose the digits."""
    exact = 1 - math.comb(9_900, 1_000) / math.comb(10_000, 1_000)
    assert pass_at_k([10_000], [100], 1_000)[0] == pytest.approx(exact, rel=1e-12)
    assert pass_at_k([10**12], [1], 1)[0] == pytest.approx(1e-12, rel=1e-14)
    assert pass_at_k([4, 4, 4], [0, 3, 4], 2).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("n", "c", "k"), [([4], [5], 1), ([4], [-1], 1), ([4, 3], [1, 1], 4), ([4], [1], 0), ([4], [1, 2], 1)]
)
def test_impossible_counts(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)
    with pytest.raises(ValueError, match="at least one prompt"):
        pass_at_k_interval([], [], 1)


def test_pass_at_1_is_the_accuracy_of_lists():
    correct = np.random.default_rng(0).binomial(8, np.random.default_rng(1).uniform(0, 1, 40))
    outcomes = np.concatenate([[1.0] * c + [0.0] * (8 - c) for c in correct])
    expected = accuracy_interval(outcomes, lists=np.repeat(np.arange(40), 8))
    # (the design effect there has N/(N − 1) for the variance of the outcomes, here it is m(1 − m) itself)
    assert pass_at_k_interval(np.full(40, 8), correct, 1) == pytest.approx(expected, abs=3e-4)


def test_interval_by_hand():
    """Estimates 1, ½, 0, ½ of pass@1: m = ½, s² = 1/6, ñ = 4 · ¼ · 6 = 6."""
    mean, low, high = pass_at_k_interval([2, 2, 2, 2], [2, 1, 0, 1], 1)
    expected = stats.binomtest(3, 6).proportion_ci(0.95, method="wilson")
    assert (mean, low, high) == pytest.approx((0.5, expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("correct", [[0] * 5, [4] * 5, [2] * 5])
def test_equal_estimates_count_prompts(correct):
    mean, low, high = pass_at_k_interval([4] * 5, correct, 1)
    expected = stats.binomtest(round(mean * 10), 10).proportion_ci(0.95, method="wilson")
    assert high - low > expected.high - expected.low  # 5 outcomes say less than 10
    assert low <= mean <= high


@pytest.mark.parametrize("k", [1, 4])
def test_interval_covers_the_truth(k):
    """Prompts with success rates from a Beta distribution, 8 samples each: E[1 − (1 − p)^k] is known in closed form."""
    generator = np.random.default_rng(k)
    a, b = 0.6, 1.4
    truth = 1 - math.exp(math.lgamma(b + k) - math.lgamma(b) + math.lgamma(a + b) - math.lgamma(a + b + k))
    intervals = [
        pass_at_k_interval(np.full(60, 8), generator.binomial(8, generator.beta(a, b, 60)), k) for _ in range(2000)
    ]
    means, lows, highs = np.array(intervals).T
    assert means.mean() == pytest.approx(truth, abs=0.004)
    assert 0.935 < ((lows <= truth) & (truth <= highs)).mean() < 0.975


def test_metrics_are_named():
    metrics = pass_at_k_metrics([4, 4], [1, 4], [1, 2])
    assert list(metrics) == ["pass@1", "pass@1_low", "pass@1_high", "pass@2", "pass@2_low", "pass@2_high"]
    assert metrics["pass@1"] == 0.625
    assert metrics["pass@2"] == 0.75
    assert metrics["pass@2_low"] == pass_at_k_interval([4, 4], [1, 4], 2)[1]


# -------------------------------------------------------------------------------------------------------------- means


def test_mean_interval_of_single_samples_is_students():
    values = np.random.default_rng(0).normal(3, 2, 17)
    expected = stats.t.interval(0.9, 16, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values, np.arange(17), 0.9) == pytest.approx((values.mean(), *expected), rel=1e-12)
    assert mean_interval(values, level=0.9) == mean_interval(values, np.arange(17), 0.9)


def test_mean_interval_of_equal_groups_is_that_of_their_means():
    values = np.random.default_rng(0).normal(0, 1, (9, 4)) + np.arange(9)[:, None]
    alone = mean_interval(values.mean(axis=1), np.arange(9))
    assert mean_interval(values.ravel(), np.repeat(np.arange(9), 4)) == pytest.approx(alone, rel=1e-12)
    # as if all samples were independent it would be half as wide
    _, low, high = mean_interval(values.ravel(), np.arange(36))
    assert high - low < 0.6 * (alone[2] - alone[1])


def test_mean_interval_of_unequal_groups_covers_the_truth():
    generator = np.random.default_rng(5)
    names = np.repeat(np.arange(40), np.tile([1, 2, 5, 8], 10))
    hits = 0
    for _ in range(2000):
        values = generator.normal(0, 1, 40)[names] + generator.normal(0, 1, len(names))
        _, low, high = mean_interval(values, names)
        hits += low <= 0 <= high
    assert 0.92 < hits / 2000 < 0.965


def test_one_prompt_says_nothing_of_others():
    mean, low, high = mean_interval([1.0, 3.0], ["a", "a"])
    assert mean == 2
    assert math.isnan(low)
    assert math.isnan(high)
    for wrong in (([], []), ([1.0], [1, 2])):
        with pytest.raises(ValueError):
            mean_interval(*wrong)
    with pytest.raises(ValueError, match="level"):
        mean_interval([1.0, 2.0], [1, 2], 1.0)
