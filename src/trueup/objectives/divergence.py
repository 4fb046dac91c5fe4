"""Distances between policies: exact per state, estimated from the log-probs of what was sampled.

The KL of two sequence models is a sum over tokens, but its *gradient* isn't the sum of the tokens' own gradients: a
token also changes which states come after it. For samples y ~ π, what each form gives:

| form | expected gradient |
|---|---|
| ``kl_penalized_rewards`` (k1 in the reward), undiscounted returns, ``reinforce`` | exact |
| ``sequence_k2`` as a loss | exact |
| ``prefix_weighted`` k1 or k3 as a loss, summed over tokens | exact, off-policy too |
| ``token_weighted`` k1 or k3 as a loss | the tokens' own KL gradients only: what follows is left out |
| token ``k2`` as a loss | the same |
| token ``k3`` as a loss (GRPO as published) | another divergence's: that of KL(π_ref‖π) in each state |
| token ``k1`` as a loss | zero |
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trueup.objectives.policy_gradient import log_ratio, ratio
from trueup.objectives.shapes import fill_masked, require_same_shape


def categorical_kl(
    logprobs: Float[Tensor, "*batch v"], other_logprobs: Float[Tensor, "*batch v"]
) -> Float[Tensor, "*batch"]:
    """The exact KL divergence of two categorical distributions, in nats.

        KL(p‖q) = Σ_v p_v · (log p_v − log q_v)

    Both arguments are normalised log-probs (after ``log_softmax``), p first; gradient flows into both. Outcomes with
    p = 0 add 0; q = 0 where p > 0 gives infinity. Shapes: [..., V] → [...]. Raises ``ValueError`` if they differ.
    Source: Kullback & Leibler 1951.
    """
    require_same_shape(logprobs, other_logprobs=other_logprobs)
    possible = logprobs > -torch.inf
    difference = fill_masked(logprobs, possible) - fill_masked(other_logprobs, possible)
    return (logprobs.exp() * difference).sum(-1)


def k1(logprobs: Float[Tensor, "*batch"], ref_logprobs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The log-ratio itself: unbiased for KL(π‖π_ref) under samples of π, of any sign, with much variance.

        k1 = log π − log π_ref

    As a *loss* over tokens its expected gradient is zero (E[∇log π] = 0): it belongs into the reward.
    Shapes: [...], alike, of tokens or of sequences. Units: nats. No gradient flows into ``ref_logprobs``.
    Raises ``ValueError`` if the shapes differ. Source: Schulman 2020, "Approximating KL divergence".
    """
    return log_ratio(logprobs, ref_logprobs)


def k2(logprobs: Float[Tensor, "*batch"], ref_logprobs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Half the squared log-ratio: never negative, little variance, biased as a value.

        k2 = ½ (log π − log π_ref)²

    As a *loss* on what π sampled, the gradient is k1·∇log π, in the mean exactly that of KL(π‖π_ref) over the outcomes
    that the log-probs are of: sequences for sequence log-probs (``sequence_k2``), single tokens for token log-probs.
    Shapes: [...], alike. Units: nats (as an estimate). No gradient flows into ``ref_logprobs``.
    Raises ``ValueError`` if the shapes differ. Source: Schulman 2020, "Approximating KL divergence".
    """
    return 0.5 * log_ratio(logprobs, ref_logprobs).square()


def k3(logprobs: Float[Tensor, "*batch"], ref_logprobs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The log-ratio plus a control variate: unbiased for KL(π‖π_ref) under samples of π, never negative.

        k3 = π_ref/π − 1 + log(π/π_ref)

    As a *loss* on what π sampled, the gradient is (1 − π_ref/π)·∇log π, in the mean that of KL(π_ref‖π), the other
    direction. GRPO as published uses it so, per token. Shapes: [...], alike. Units: nats.
    No gradient flows into ``ref_logprobs``. Raises ``ValueError`` if the shapes differ.
    Source: Schulman 2020, "Approximating KL divergence"; Shao et al. 2024 (arXiv 2402.03300), eq. 4.
    """
    difference = log_ratio(logprobs, ref_logprobs)
    # expm1 keeps the digits where the policies are close and exp(−x) − 1 + x is of second order.
    return torch.expm1(-difference) + difference


def k3_of_old(logprobs: Float[Tensor, "*batch"], old_logprobs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """KL(π_old‖π) from what π_old sampled: how far the policy has moved since, never negative.

        k = ρ − 1 − log ρ,    ρ = π/π_old

    Unbiased, value and gradient: ∇k = (ρ − 1)·∇log π, whose mean under π_old is −E_old[∇log π] = ∇KL(π_old‖π) in every
    state. The penalty of ``kl_penalized_surrogate`` where the whole distribution is too large to keep, and the metric
    ``approx_kl``. Shapes: [...], alike. Units: nats. No gradient flows into ``old_logprobs``.
    Raises ``ValueError`` if the shapes differ. Source: Schulman 2020, "Approximating KL divergence".
    """
    difference = log_ratio(logprobs, old_logprobs)
    return torch.expm1(difference) - difference


def kl_penalized_rewards(
    rewards: Float[Tensor, "*batch t"],
    logprobs: Float[Tensor, "*batch t"],
    ref_logprobs: Float[Tensor, "*batch t"],
    *,
    kl_coef: int | float | Float[Tensor, ""],
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """k1 in the reward: every token pays for its own log-ratio.

        r'_t = r_t − β · (log π(y_t) − log π_ref(y_t))

    With ``reinforce`` on the *undiscounted* returns of r' the expected gradient is that of E[Σ r] − β·KL(π‖π_ref) over
    whole sequences, exactly. A discount would discount the KL too. The result is a constant: no gradient flows
    through it. Shapes: all [..., T]; 0 where masked. Units: rewards; β is rewards per nat.
    Raises ``ValueError`` if the shapes differ.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), eq. 2, per token as in Ouyang et al. 2022 (arXiv 2203.02155).
    """
    require_same_shape(rewards, logprobs=logprobs)
    return fill_masked(rewards - kl_coef * log_ratio(logprobs, ref_logprobs), mask).detach()


def sequence_k2(
    logprobs: Float[Tensor, "*batch t"],
    ref_logprobs: Float[Tensor, "*batch t"],
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch"]:
    """k2 of whole sequences: the sum of log-ratios is squared, not each of them.

        ½ (Σ_t log π(y_t) − log π_ref(y_t))²

    As a loss on sequences that π sampled, the expected gradient is that of KL(π‖π_ref) over sequences, exactly.
    Shapes: [..., T] → [...]. Units: nats (as an estimate, biased). Raises ``ValueError`` if the shapes differ.
    Source: the estimator of Schulman 2020, taken over sequences.
    """
    return 0.5 * log_ratio(logprobs, ref_logprobs, mask).sum(-1).square()


def prefix_ratio(
    logprobs: Float[Tensor, "*batch t"],
    old_logprobs: Float[Tensor, "*batch t"],
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """Importance weight of everything up to and including token t.

        w_t = Π_{j≤t} π(y_j) / π_old(y_j)

    Right after sampling its value is 1, and its gradient is that of the log-prob of the whole prefix.
    Shapes: all [..., T]; masked tokens count as 1 in the product, and get 1.
    Raises ``ValueError`` if the shapes differ.
    Source: Precup, Sutton & Singh 2000 (per-decision importance sampling).
    """
    return fill_masked(log_ratio(logprobs, old_logprobs, mask).cumsum(-1).exp(), mask, 1.0)


def prefix_weighted(
    estimates: Float[Tensor, "*batch t"],
    logprobs: Float[Tensor, "*batch t"],
    old_logprobs: Float[Tensor, "*batch t"],
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """Per-token KL estimates, weighted so that their sum is exact over sequences, value and gradient.

        w_t · k_t,    w_t = Π_{j≤t} π(y_j) / π_old(y_j)

    ``estimates``: ``k1`` or ``k3`` of the current policy, with gradient. Summed over t (``sequence_sum``) and averaged
    over sequences of π_old, value and gradient are those of KL(π‖π_ref) for any π_old that covers π. The weights'
    variance grows with length when π has moved. Shapes: all [..., T]; 0 where masked. Units: nats.
    Raises ``ValueError`` if the shapes differ.
    Source: Precup, Sutton & Singh 2000 (per-decision importance sampling), applied to the estimators of Schulman 2020.
    """
    require_same_shape(estimates, logprobs=logprobs)
    return fill_masked(prefix_ratio(logprobs, old_logprobs, mask) * estimates, mask)


def token_weighted(
    estimates: Float[Tensor, "*batch t"],
    logprobs: Float[Tensor, "*batch t"],
    old_logprobs: Float[Tensor, "*batch t"],
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """Per-token KL estimates, each weighted with its own token's ratio.

        ρ_t · k_t,    ρ_t = π(y_t) / π_old(y_t)

    Exact for the KL of a single choice. Over sequences the gradient leaves out what a token does to the states after
    it; ``prefix_weighted`` doesn't. Shapes: all [..., T]; 0 where masked. Units: nats.
    Raises ``ValueError`` if the shapes differ.
    Source: with k3 it is the KL term of DeepSeek-V3.2 (DeepSeek-AI 2025, "Scaling GRPO").
    """
    require_same_shape(estimates, logprobs=logprobs)
    return fill_masked(ratio(logprobs, old_logprobs, mask) * estimates, mask)
