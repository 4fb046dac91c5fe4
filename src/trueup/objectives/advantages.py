"""Advantages: how much better a step, or a completion, was than expected.

Steps: ``td_errors`` and ``gae``, with the conventions of ``returns`` (time last, discounts, ``truncated``, ``mask``).
Completions: comparisons inside a group ``[..., K]`` of completions of one prompt. Nothing here whitens, clips or
rescales on its own: ``whiten`` is a step of its own, and takes its statistics from the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trueup.objectives.returns import lambda_returns
from trueup.objectives.shapes import fill_masked, require_same_shape


def td_errors(
    rewards: Float[Tensor, "*batch t"],
    discounts: Float[Tensor, "*batch t"],
    values: Float[Tensor, "*batch t"],
    next_values: Float[Tensor, "*batch t"],
    *,
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """One-step temporal-difference errors.

        δ_t = r_t + d_t · V(s_{t+1}) − V(s_t)

    With the true values of the policy, the mean of δ_t given (s_t, a_t) is the advantage A(s_t, a_t).
    Shapes: all [..., T]; 0 where masked. Units: those of the rewards. Raises ``ValueError`` if the shapes differ.
    Source: Sutton 1988; Sutton & Barto 2018, eq. 6.5.
    """
    return gae(rewards, discounts, values, next_values, gae_lambda=0.0, mask=mask)


def gae(
    rewards: Float[Tensor, "*batch t"],
    discounts: Float[Tensor, "*batch t"],
    values: Float[Tensor, "*batch t"],
    next_values: Float[Tensor, "*batch t"],
    *,
    gae_lambda: float,
    truncated: Bool[Tensor, "*batch t"] | None = None,
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """Generalised advantage estimation: TD errors, summed with weights λ^l times the discounts between.

        A_t = δ_t + d_t · λ · A_{t+1},    and where cut:    A_t = δ_t          (for a constant γ: Σ_l (γλ)^l δ_{t+l})

    Equals the λ-return minus the value. λ = 0: the TD error; λ = 1: bootstrapped return − value, unbiased whatever the
    values are, if the last bootstrap is.
    Shapes: all [..., T]; 0 where masked. Units: those of the rewards.
    ``next_values`` usually is ``returns.next_values(values, bootstrap, mask)``.
    Raises ``ValueError`` if the shapes differ or λ lies outside [0, 1].
    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16.
    """
    require_same_shape(rewards, values=values, next_values=next_values)
    # Written with TD errors, not as λ-return − V: no large numbers are subtracted.
    errors = rewards + discounts * next_values - values
    return lambda_returns(
        errors, discounts, torch.zeros_like(errors), lambda_=gae_lambda, truncated=truncated, mask=mask
    )


def group_centered(
    scores: Float[Tensor, "*groups k"], mask: Bool[Tensor, "*groups k"] | None = None
) -> Float[Tensor, "*groups k"]:
    """Each completion's score minus the mean score of its group.

        A_i = r_i − 1/k · Σ_j r_j

    Its own score is part of the baseline, so the policy gradient shrinks by (k−1)/k (``leave_one_out`` does not).
    ``mask``: which entries there are, where groups differ in size (k is then their number in each); 0 elsewhere.
    Shapes: [..., K] → [..., K]. Units: those of the scores. A group whose scores are all equal gives exactly 0.
    Raises ``ValueError`` if the shapes differ.
    The advantage of Dr.GRPO (Liu et al. 2025, arXiv 2503.20783).
    """
    present, count = _present(scores, mask)
    # Measured from the lowest score, equal scores are all exactly 0, whatever the rounding of their mean.
    lowest = torch.where(present, scores, torch.inf).amin(-1, keepdim=True)
    above = torch.where(present, scores - lowest, 0.0)
    return torch.where(present, above - above.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)


def group_normalized(
    scores: Float[Tensor, "*groups k"], mask: Bool[Tensor, "*groups k"] | None = None, *, ddof: int, eps: float
) -> Float[Tensor, "*groups k"]:
    """Group-centred scores divided by the group's standard deviation.

        A_i = (r_i − mean_j r_j) / (std_j r_j + ε),    std² = 1/(k − ddof) · Σ_j (r_j − mean r)²

    Groups of all difficulties get the same spread. That rescales each prompt's reward by 1/std, so together with a KL
    term the optimum is not π_ref·exp(r/β) any more. ``ddof``: 0 for the population's, 1 for the sample's standard
    deviation (torch's and TRL's). ``eps`` is added to the standard deviation, in units of the scores. ``mask``: which
    entries there are, where groups differ in size: with process supervision a group is the rewards of all steps of its
    completions (§4.1.3); 0 elsewhere, and for a single entry.
    Shapes: [..., K] → [..., K], without units. A group whose scores are all equal (max = min: rounding can leave its
    computed std above 0) gives exactly 0, with ε = 0 too.
    Raises ``ValueError`` for K ≤ ddof, negative ε or shapes that differ.
    The advantage of GRPO (Shao et al. 2024, arXiv 2402.03300, §4.1.2 and §4.1.3).
    """
    if scores.shape[-1] <= ddof:
        raise ValueError(f"a group of {scores.shape[-1]} has no standard deviation with ddof={ddof}")
    if eps < 0:
        raise ValueError(f"eps can't be negative, as {eps} is")
    centered = group_centered(scores, mask)
    present, count = _present(scores, mask)
    std = (centered.square().sum(-1, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()
    highest = torch.where(present, scores, -torch.inf).amax(-1, keepdim=True)
    lowest = torch.where(present, scores, torch.inf).amin(-1, keepdim=True)
    return centered / torch.where(highest <= lowest, 1.0, std + eps)


def _present(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which entries of a group there are, and how many: [..., K] and [..., 1]."""
    require_same_shape(scores, mask=mask)
    present = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    return present, present.sum(-1, keepdim=True)


def leave_one_out(scores: Float[Tensor, "*groups k"]) -> Float[Tensor, "*groups k"]:
    """Each completion's score minus the mean score of its k−1 siblings.

        A_i = r_i − 1/(k−1) · Σ_{j≠i} r_j

    Unbiased: the baseline of i does not depend on i. Equals ``k/(k−1) * group_centered(scores)``.
    Shapes: [..., K] → [..., K]. Units: those of the scores. A group whose scores are all equal gives exactly 0.
    Raises ``ValueError`` for k = 1, which has no siblings.
    Source: Kool et al. 2019 ("Buy 4 REINFORCE samples, get a baseline for free"); for language models Ahmadian et al.
    2024 (arXiv 2402.14740).
    """
    k = scores.shape[-1]
    if k < 2:
        raise ValueError(f"a group of {k} has no siblings to leave one out from")
    return group_centered(scores) * (k / (k - 1))


def running_mean(
    mean: Float[Tensor, ""], num_scores: int, scores: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, ""], int]:
    """The mean of all scores so far, moved on by one batch: a constant baseline for REINFORCE.

        n' = n + |batch|,    b' = b + 1/n' · Σ_i (r_i − b)

    Use the mean from *before* the batch as its baseline: then it doesn't depend on the batch's actions and adds no
    bias. Start with mean 0 and ``num_scores`` 0. Shapes: [] and [...] → the new mean, [], and count. Units: scores.
    Source: Williams 1992 (reinforcement baseline).
    """
    total = num_scores + scores.numel()
    return (mean + (scores - mean).sum() / max(total, 1)), total


def optimal_baseline(returns: Float[Tensor, "*batch"], squared_norms: Float[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """The constant baseline with the least variance of the gradient estimate.

        b* = E[‖∇log π(τ)‖² · R(τ)] / E[‖∇log π(τ)‖²]

    Shapes: returns and squared gradient norms of the trajectories' log-probs, [...] each → scalar; to weigh
    trajectories, multiply ``squared_norms`` with their probabilities. Units: those of the returns.
    Raises ``ValueError`` if the shapes differ.
    Source: Greensmith, Bartlett & Baxter 2004 (optimal constant baseline).
    """
    require_same_shape(returns, squared_norms=squared_norms)
    return (squared_norms * returns).sum() / squared_norms.sum()


class Statistics(NamedTuple):
    """Count, mean and population variance of the scored entries of a batch: scalars, or one of each for every row."""

    count: Tensor
    mean: Tensor
    variance: Tensor


def statistics_of(
    x: Float[Tensor, "*batch"], mask: Bool[Tensor, "*batch"] | None = None, *, dim: int | None = None
) -> Statistics:
    """Count, mean and population variance of the scored entries, of all of them or along ``dim``.

    Computed around the smallest entry, so that equal entries have that very mean and variance 0, without rounding.
    Shapes: any, mask alike → three scalars; with ``dim`` that dimension has size 1. No entry scored: all three are 0.
    Raises ``ValueError`` if the shapes differ.
    """
    require_same_shape(x, mask=mask)
    if dim is None:
        of_one_row = statistics_of(x.reshape(-1), None if mask is None else mask.reshape(-1), dim=0)
        return Statistics(*(value.squeeze(0) for value in of_one_row))
    if x.shape[dim] == 0:
        nothing = x.sum(dim, keepdim=True)
        return Statistics(nothing, nothing.clone(), nothing.clone())
    if mask is None:
        above = x - (lowest := x.amin(dim, keepdim=True))
        mean = above.mean(dim, keepdim=True)
        return Statistics(
            torch.full_like(mean, x.shape[dim]), lowest + mean, (above - mean).square().mean(dim, keepdim=True)
        )
    count = mask.sum(dim, keepdim=True).to(x.dtype)
    lowest = torch.where(mask, x, torch.inf).amin(dim, keepdim=True).where(count > 0, 0.0)
    x = fill_masked(x, mask)
    mean = fill_masked(x - lowest, mask).sum(dim, keepdim=True) / count.clamp(min=1)
    squares = fill_masked((x - lowest - mean).square(), mask)
    return Statistics(count, lowest + mean, squares.sum(dim, keepdim=True) / count.clamp(min=1))


def merge_statistics(first: Statistics, second: Statistics) -> Statistics:
    """Statistics of two batches together, as if they had been one: for micro-batches and several machines.

        n = n₁ + n₂,    μ = μ₁ + Δ·n₂/n,    σ² = (n₁σ₁² + n₂σ₂²)/n + Δ²·n₁n₂/n²,    Δ = μ₂ − μ₁

    Source: Chan, Golub & LeVeque 1983 (pairwise updating of means and variances).
    """
    count = first.count + second.count
    share = second.count / count.clamp(min=1)
    gap = second.mean - first.mean
    variance = first.variance + share * (second.variance - first.variance) + gap.square() * share * (1 - share)
    return Statistics(count, first.mean + gap * share, variance)


def whiten(
    x: Float[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch"] | None = None,
    statistics: Statistics | None = None,
    *,
    center: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, "*batch"]:
    """Shift and scale to mean 0 and standard deviation 1.

        y = (x − μ) / (σ + ε),    and with ``center=False``:    y = (x − μ) / (σ + ε) + μ

    μ and σ (population) are those of the scored entries of ``x``, or the ``statistics`` of the whole batch, which makes
    micro-batches agree with the one big batch. ``center=False`` changes the spread and keeps the mean.
    Shapes: any, mask alike; 0 where masked. Without units if centred. All equal: exactly 0 (for ε > 0).
    Couples all entries: advantages whitened over a batch are no longer unbiased.
    Raises ``ValueError`` if the shapes differ.
    Source: the advantage normalisation of PPO implementations (Huang et al. 2022, "The 37 implementation details of
    proximal policy optimization"); REINFORCE++ (Hu 2025, arXiv 2501.03262).
    """
    _, mean, variance = statistics_of(x, mask) if statistics is None else statistics
    y = (fill_masked(x, mask) - mean) / (variance.sqrt() + eps)
    if not center:
        y = y + mean
    return fill_masked(y, mask)
