"""Advantages: goldens, identities, groups whose scores are all equal, unbiasedness over all trajectories and groups."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trueup.mdp import enumerate_trajectories, exact
from trueup.mdp.generators import random_mdp
from trueup.objectives.advantages import (
    Statistics,
    gae,
    group_centered,
    group_normalized,
    leave_one_out,
    merge_statistics,
    optimal_baseline,
    running_mean,
    statistics_of,
    td_errors,
    whiten,
)
from trueup.objectives.returns import discounted_returns, discounts_from, lambda_returns, next_values


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def b(*flags: int) -> Tensor:
    return torch.tensor(flags, dtype=torch.bool)


REWARDS, VALUES, NEXT_VALUES, HALF = t(1, 2, 3), t(2, 4, 6), t(4, 6, 8), t(0.5, 0.5, 0.5)


def test_td_errors_golden() -> None:
    assert td_errors(REWARDS, HALF, VALUES, NEXT_VALUES).tolist() == [1 + 2 - 2, 2 + 3 - 4, 3 + 4 - 6]
    masked = td_errors(REWARDS, HALF, t(2, math.nan, 6), NEXT_VALUES, mask=b(1, 0, 1))
    assert masked.tolist() == [1, 0, 1]


def test_gae_golden() -> None:
    # All TD errors are 1; with γλ = ¼: 1, 1 + ¼, 1 + ¼·1.25
    assert gae(REWARDS, HALF, VALUES, NEXT_VALUES, gae_lambda=0.5).tolist() == [1.3125, 1.25, 1.0]


def test_gae_keeps_the_bootstrap_of_a_truncated_step_and_cuts_there() -> None:
    truncated = gae(REWARDS, HALF, VALUES, NEXT_VALUES, gae_lambda=0.5, truncated=b(0, 1, 0))
    assert truncated.tolist() == [1.25, 1.0, 1.0]
    # Terminated instead: no bootstrap, δ_1 = 2 − 4, and nothing from step 2.
    terminated = gae(REWARDS, discounts_from(b(0, 1, 0), 0.5, dtype=torch.float64), VALUES, NEXT_VALUES, gae_lambda=0.5)
    assert terminated.tolist() == [0.5, -2.0, 1.0]


def test_gae_bridges_a_masked_gap() -> None:
    nan = math.nan
    mask, values = b(1, 0, 0, 1, 1, 0), t(2, nan, nan, 4, 6, nan)
    following = next_values(values, torch.tensor(8.0, dtype=torch.float64), mask)
    assert following.tolist() == [4, 0, 0, 6, 8, 0]
    rewards, discounts = t(1, nan, nan, 2, 3, nan), t(0.5, nan, nan, 0.5, 0.5, nan)
    bridged = gae(rewards, discounts, values, following, gae_lambda=0.5, mask=mask)
    assert bridged.tolist() == [1.3125, 0, 0, 1.25, 1.0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_gae_is_the_lambda_return_minus_the_value(seed: int) -> None:
    """And with λ = 1 the bootstrapped return minus the value, with λ = 0 the TD error."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn((2, 3, 9), generator=generator, dtype=torch.float64)
    bootstrap = torch.randn(3, generator=generator, dtype=torch.float64)
    flags = torch.rand((2, 3, 9), generator=generator)
    mask = flags[1] < 0.8
    discounts = discounts_from(flags[0] < 0.15, 0.9, dtype=torch.float64)
    following = next_values(values, bootstrap, mask)
    for lambda_ in (0.0, 0.4, 1.0):
        advantages = gae(rewards, discounts, values, following, gae_lambda=lambda_, mask=mask)
        returns = lambda_returns(rewards, discounts, following, lambda_=lambda_, mask=mask)
        torch.testing.assert_close(advantages, torch.where(mask, returns - values, 0.0), rtol=0, atol=1e-13)
    monte_carlo = discounted_returns(rewards, discounts, following, mask=mask)
    torch.testing.assert_close(advantages, torch.where(mask, monte_carlo - values, 0.0), rtol=0, atol=1e-13)
    one_step = gae(rewards, discounts, values, following, gae_lambda=0.0, mask=mask)
    torch.testing.assert_close(td_errors(rewards, discounts, values, following, mask=mask), one_step)


@pytest.mark.parametrize(
    ("wrong_by", "gae_lambda", "unbiased"), [(0, 0, 1), (0, 0.7, 1), (0, 1, 1), (1, 1, 1), (1, 0.7, 0)]
)
def test_expectation_of_gae_is_the_advantage(wrong_by: int, gae_lambda: float, unbiased: int) -> None:
    """E[A_t | s, a] over all trajectories: exact with the true values for any λ, with wrong values only for λ = 1.

    With wrong values and λ = 1 the advantage is off by the value's error, the same for every action.
    """
    mdp = random_mdp(1, num_states=4, num_actions=2, gamma=0.9, episodic=True)
    policy = np.random.default_rng(0).dirichlet(np.ones(2), size=4)
    paths = enumerate_trajectories(mdp, policy, horizon=3)
    error = wrong_by * np.array([0.5, -1.0, 2.0, 0.0])
    values = exact.values(mdp, policy) + error
    estimates = gae(
        torch.tensor(paths.rewards),
        discounts_from(torch.tensor(paths.terminated), mdp.gamma, dtype=torch.float64),
        torch.tensor(values[paths.states]),
        torch.tensor(values[paths.next_states]),
        gae_lambda=float(gae_lambda),
        mask=torch.tensor(paths.mask),
    ).numpy()
    truth = exact.advantages(mdp, policy) - error[:, None]
    gaps = []
    for state, action in itertools.product(range(3), range(2)):
        chosen = paths.mask & (paths.states == state) & (paths.actions == action)
        weights = paths.probabilities[:, None] * chosen
        gaps.append(abs((weights * estimates).sum() / weights.sum() - truth[state, action]))
    assert (max(gaps) < 1e-12) == bool(unbiased)


def test_group_advantages_golden() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    assert group_centered(scores).tolist() == [[-2, -1, 3], [-1, -1, 2]]
    assert leave_one_out(scores).tolist() == [[-3, -1.5, 4.5], [-1.5, -1.5, 3]]
    # population: variances 14/3 and 2; sample: 7 and 3
    root = math.sqrt
    torch.testing.assert_close(
        group_normalized(scores, ddof=0, eps=0.0),
        torch.tensor([[-2, -1, 3], [-1, -1, 2]], dtype=torch.float64) / t(root(14 / 3), root(2)).unsqueeze(-1),
    )
    torch.testing.assert_close(
        group_normalized(scores, ddof=1, eps=0.5),
        torch.tensor([[-2, -1, 3], [-1, -1, 2]], dtype=torch.float64) / t(root(7) + 0.5, root(3) + 0.5).unsqueeze(-1),
    )


def test_groups_of_different_sizes() -> None:
    """A masked entry, whatever stands there, changes nothing, and gets 0."""
    scores = torch.tensor([[1.0, 3.0, 9.0], [5.0, math.inf, 5.0], [math.nan, 4.0, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, True], [False, True, False]])
    assert group_centered(scores, mask).tolist() == [[-1, 1, 0], [0, 0, 0], [0, 0, 0]]
    for ddof, std in ((0, 1.0), (1, math.sqrt(2))):
        normalized = group_normalized(scores, mask, ddof=ddof, eps=0.0)
        torch.testing.assert_close(normalized, group_centered(scores, mask) / std)
    assert group_normalized(t(2, 4), b(0, 0), ddof=0, eps=0.0).tolist() == [0, 0]
    with pytest.raises(ValueError, match="mask"):
        group_centered.__wrapped__(t(2, 4), b(1))


def test_leave_one_out_is_k_over_k_minus_one_times_centered() -> None:
    scores = torch.randn(5, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(scores), 7 / 6 * group_centered(scores))
    # and what its name says
    siblings = torch.stack([scores[..., [j for j in range(7) if j != i]].mean(-1) for i in range(7)], -1)
    torch.testing.assert_close(leave_one_out(scores), scores - siblings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [0.1, 1 / 3, -7.7, 1e-30, 12345.678])
@pytest.mark.parametrize("k", [2, 3, 7, 10])
def test_equal_scores_give_exactly_zero(score: float, k: int, dtype: torch.dtype) -> None:
    """Also where rounding leaves the mean beside the scores, so that the computed std isn't 0; and with ε = 0."""
    scores = torch.full((2, k), score, dtype=dtype)
    for advantages in (
        group_centered(scores),
        leave_one_out(scores),
        group_normalized(scores, ddof=0, eps=0.0),
        group_normalized(scores, ddof=1, eps=1e-6),
        whiten(scores),
    ):
        assert advantages.eq(0).all()


def test_equality_is_max_equal_min_not_std_zero() -> None:
    """The naive way: at these scores the std of equal numbers is above 0, and dividing by it invents advantages."""
    scores = torch.full((10,), 0.1, dtype=torch.float32)
    naive = (scores - scores.mean()) / scores.std(correction=0)
    assert scores.std(correction=0) > 0
    assert naive.abs().max() > 0.5
    assert group_normalized(scores, ddof=0, eps=0.0).eq(0).all()
    # and scores that differ only a little are not taken for equal
    assert group_normalized(t(0.1, 0.1, 0.1 + 1e-9), ddof=0, eps=0.0).abs().min() > 0.5


def test_dr_grpo_keeps_and_grpo_drops_the_scale_of_the_rewards() -> None:
    scores = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(group_centered(10 * scores), 10 * group_centered(scores))
    torch.testing.assert_close(
        group_normalized(10 * scores, ddof=0, eps=0.0), group_normalized(scores, ddof=0, eps=0.0)
    )
    torch.testing.assert_close(group_normalized(scores, ddof=0, eps=0.0).square().mean(-1), t(1, 1, 1, 1))
    shifted = group_normalized(scores + 5, ddof=1, eps=1e-4)
    torch.testing.assert_close(shifted, group_normalized(scores, ddof=1, eps=1e-4))


def gradient_over_all_groups(advantage, logits: Tensor, rewards: Tensor, k: int) -> Tensor:
    """E over all groups of k independent draws of 1/k Σ_i A_i ∇log π(y_i), without sampling."""
    logprobs = torch.log_softmax(logits, -1)
    groups = torch.tensor(list(itertools.product(range(len(rewards)), repeat=k)))
    probabilities = logprobs[groups].sum(-1).exp().detach()
    objective = (probabilities * (advantage(rewards[groups]) * logprobs[groups]).mean(-1)).sum()
    return torch.autograd.grad(objective, logits)[0]


def test_group_baselines_over_all_groups() -> None:
    """Leave-one-out is unbiased; centring shrinks the gradient by (k−1)/k; the std changes its direction."""
    logits = torch.tensor([0.3, -0.5, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    rewards, k = t(1.0, 0.2, -0.7, 3.0), 3
    (exact_gradient,) = torch.autograd.grad((torch.softmax(logits, -1) * rewards).sum(), logits)
    loo = gradient_over_all_groups(leave_one_out, logits, rewards, k)
    torch.testing.assert_close(loo, exact_gradient, rtol=0, atol=1e-12)
    centered = gradient_over_all_groups(group_centered, logits, rewards, k)
    torch.testing.assert_close(centered, (k - 1) / k * exact_gradient, rtol=0, atol=1e-12)
    normalized = gradient_over_all_groups(lambda r: group_normalized(r, ddof=0, eps=0.0), logits, rewards, k)
    assert torch.nn.functional.cosine_similarity(normalized, exact_gradient, dim=0) < 0.99


def test_with_the_std_grpo_does_not_end_at_the_regularised_optimum() -> None:
    """At π* ∝ π_ref·exp(r/β) the exact gradient of E[r] − β·KL is 0; leave-one-out stays there, GRPO's std moves on."""
    beta, rewards = 0.5, t(1.0, 0.2, -0.7, 3.0)
    reference = torch.log_softmax(t(0.0, 1.0, -1.0, 0.5), -1)
    logits = (reference + rewards / beta).requires_grad_()
    kl = (torch.softmax(logits, -1) * (torch.log_softmax(logits, -1) - reference)).sum()
    (kl_gradient,) = torch.autograd.grad(kl, logits)
    kept = gradient_over_all_groups(leave_one_out, logits, rewards, 3) - beta * kl_gradient
    assert kept.abs().max() < 1e-12
    moved = gradient_over_all_groups(lambda r: group_normalized(r, ddof=1, eps=1e-4), logits, rewards, 3)
    assert (moved - beta * kl_gradient).abs().max() > 1e-3


def test_running_mean_golden() -> None:
    zero = torch.tensor(0.0, dtype=torch.float64)
    assert running_mean(zero, 0, t()) == (0, 0)
    assert running_mean(zero, 0, t(3)) == (3, 1)
    mean, count = running_mean(zero, 0, t(1, 3))
    assert (mean.item(), count) == (2.0, 2)
    mean, count = running_mean(mean, count, t(5, 5, 5, 5))
    assert (mean.item(), count) == (4.0, 6)


def test_optimal_baseline_has_the_least_variance() -> None:
    """Over all outcomes of a softmax bandit: no constant gives the gradient estimate a smaller second moment."""
    logits = torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64)
    rewards, probabilities = t(1.0, 0.2, -0.7), torch.softmax(logits, -1)
    scores = torch.eye(3, dtype=torch.float64) - probabilities  # ∇log π(y), one row per outcome
    best = optimal_baseline(rewards, probabilities * scores.square().sum(-1))

    def second_moment(baseline: Tensor) -> float:
        return (probabilities * ((rewards - baseline).unsqueeze(-1) * scores).square().sum(-1)).sum().item()

    for offset in (-0.5, -1e-3, 1e-3, 0.5):
        assert second_moment(best) < second_moment(best + offset)
    assert second_moment(best) < second_moment((probabilities * rewards).sum())


def test_whiten_golden() -> None:
    x, mask = t(1, math.nan, 3), b(1, 0, 1)
    assert whiten(x, mask, eps=0.0).tolist() == [-1, 0, 1]
    assert whiten(x, mask, eps=0.0, center=False).tolist() == [1, 0, 3]
    assert whiten(2 * x, mask, eps=1.0).tolist() == [-2 / 3, 0, 2 / 3]
    count, mean, variance = statistics_of(x, mask)
    assert (count.item(), mean.item(), variance.item()) == (2, 2, 1)


def test_whiten_takes_the_statistics_of_the_whole_batch() -> None:
    """Micro-batches that are given the merged statistics come out as parts of the one big batch."""
    x, mask = 3 + 2 * torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5) < 0.7
    whole = whiten(x, mask)
    torch.testing.assert_close(whole[mask].mean(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(whole[mask].std(correction=0), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-7)
    cuts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    merged = statistics_of(x[:0])
    for cut in cuts:
        merged = merge_statistics(merged, statistics_of(x[cut], mask[cut]))
    for one, other in zip(merged, statistics_of(x, mask), strict=True):
        torch.testing.assert_close(one, other, check_dtype=False)
    parts = torch.cat([whiten(x[cut], mask[cut], merged) for cut in cuts])
    torch.testing.assert_close(parts, whole)
    alone = torch.cat([whiten(x[cut], mask[cut]) for cut in cuts])
    assert (alone - whole).abs().max() > 0.1


def test_statistics_of_nothing() -> None:
    assert statistics_of(t(1, 2), b(0, 0)) == Statistics(*torch.zeros(3))
    one = statistics_of(t(4.0))
    assert merge_statistics(statistics_of(t()), one) == one


def test_statistics_of_rows_golden() -> None:
    x = torch.tensor([[1.0, 3.0, 8.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    count, mean, variance = statistics_of(x, dim=1)
    assert (count.tolist(), mean.tolist()) == ([[3], [3]], [[4], [2]])
    torch.testing.assert_close(variance, torch.tensor([[26 / 3], [0]], dtype=torch.float64), rtol=1e-15, atol=0)
    count, mean, variance = statistics_of(x, torch.tensor([[True, True, False], [False, False, True]]), dim=-1)
    assert (count.tolist(), mean.tolist(), variance.tolist()) == ([[2], [1]], [[2], [2]], [[1], [0]])
    count, mean, variance = statistics_of(x, dim=0)
    assert (count.tolist(), mean.tolist(), variance.tolist()) == ([[2] * 3], [[1.5, 2.5, 5]], [[0.25, 0.25, 9]])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_statistics_of_rows_are_those_of_each_row(dim: int, masked: bool) -> None:
    """As separate calls would give them; the large offset shows that each row is measured from its own entries."""
    generator = torch.Generator().manual_seed(dim + 3)
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    x = x + 1e4 * torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).sum(dim, keepdim=True)
    mask = torch.rand(3, 4, 5, generator=generator) < 0.6 if masked else None
    found = statistics_of(x if mask is None else x.masked_fill(~mask, math.nan), mask, dim=dim)
    lines = x.movedim(dim, -1).reshape(-1, x.shape[dim])
    scored = (torch.ones_like(x, dtype=torch.bool) if mask is None else mask).movedim(dim, -1).reshape(lines.shape)
    alone = [statistics_of(each, of_line) for each, of_line in zip(lines, scored, strict=True)]
    for name, one in found._asdict().items():
        assert one.shape == x.sum(dim, keepdim=True).shape
        together = one.movedim(dim, -1).flatten()
        torch.testing.assert_close(together, torch.stack([getattr(each, name) for each in alone]), rtol=1e-12, atol=0)
    means = torch.stack([each[of_line].mean() for each, of_line in zip(lines, scored, strict=True)])
    kept = ~means.isnan()  # of no entry at all the mean is 0, not NaN
    torch.testing.assert_close(found.mean.movedim(dim, -1).flatten()[kept], means[kept], rtol=1e-12, atol=0)


def test_equal_entries_of_a_row_have_that_mean_and_no_variance() -> None:
    """Ten times 0.1 in float32 has a mean of another number, and a variance above 0, if it is added up as it is."""
    x = torch.tensor([0.1, 0.7]).unsqueeze(1).expand(2, 10)
    for mask in (None, torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) < 0.7):
        _, mean, variance = statistics_of(x, mask, dim=1)
        assert torch.equal(mean, x[:, :1])
        assert (variance == 0).all()


def test_statistics_of_rows_with_nothing_in_them() -> None:
    """A row without a scored entry, NaN in it or not, leaves the others alone; rows of length 0, and no rows."""
    x, mask = torch.tensor([[math.nan, math.inf], [1.0, 3.0]]), torch.tensor([[False, False], [True, True]])
    assert [each.tolist() for each in statistics_of(x, mask, dim=1)] == [[[0], [2]], [[0], [2]], [[0], [1]]]
    for empty in (x[:, :0], x[:0].T):
        for of_mask in (None, torch.ones_like(empty, dtype=torch.bool)):
            assert [each.tolist() for each in statistics_of(empty, of_mask, dim=1)] == [[[0], [0]]] * 3
    assert [each.shape for each in statistics_of(x[:0], dim=1)] == [(0, 1)] * 3
    merged = merge_statistics(statistics_of(x[:, :0], dim=1), statistics_of(x, mask, dim=1))
    assert [each.tolist() for each in merged] == [[[0], [2]], [[0], [2]], [[0], [1]]]


def test_statistics_of_rows_whiten_each_row_by_itself() -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    together = whiten(x, mask, statistics_of(x, mask, dim=1))
    torch.testing.assert_close(together, torch.stack([whiten(*row) for row in zip(x, mask, strict=True)]))
    with pytest.raises(ValueError, match="mask has the shape"):
        statistics_of.__wrapped__(x, mask[:1], dim=1)


def test_order_does_not_matter() -> None:
    scores, order = torch.randn(3, 5, dtype=torch.float64), torch.tensor([3, 1, 4, 0, 2])
    for advantage in (group_centered, leave_one_out, lambda s: group_normalized(s, ddof=1, eps=1e-6), whiten):
        torch.testing.assert_close(advantage(scores[:, order]), advantage(scores)[:, order])
        torch.testing.assert_close(advantage(scores.flip(0)), advantage(scores).flip(0))


def test_gradients_match_finite_differences() -> None:
    """Advantages are used as constants, but values may be trained through them: they are differentiable."""
    arguments = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    mask, truncated = torch.rand(2, 5) < 0.7, torch.rand(2, 5) < 0.2
    assert torch.autograd.gradcheck(
        lambda *a: gae(*a, gae_lambda=0.7, truncated=truncated, mask=mask), tuple(arguments)
    )
    for advantage in (group_centered, leave_one_out, lambda s: group_normalized(s, ddof=1, eps=0.1)):
        assert torch.autograd.gradcheck(advantage, arguments[0])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="siblings"):
        leave_one_out(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="ddof=1"):
        group_normalized(torch.zeros(3, 1), ddof=1, eps=1e-6)
    with pytest.raises(ValueError, match="eps"):
        group_normalized(torch.zeros(3, 2), ddof=0, eps=-1.0)
    with pytest.raises(ValueError, match="lambda_"):
        gae(REWARDS, HALF, VALUES, NEXT_VALUES, gae_lambda=2.0)
