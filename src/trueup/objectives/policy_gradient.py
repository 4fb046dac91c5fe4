"""Policy-gradient losses: their gradient, not their value, is what they are for.

All return one loss per step or per sequence, to be *minimised*, unreduced; ``reduce`` makes a number of them.
Advantages, old log-probs and weights are constants: no gradient flows into them. Surrogates take the probability
``ratio``, so that a ratio per step (PPO, GRPO) and one per sequence (GSPO) go through the same functions.

``old_logprobs`` are those of the policy that sampled. Until the first optimiser step after sampling they equal the
current ones: the ratio is 1, nothing is clipped, and every surrogate here has the gradient of REINFORCE.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trueup.objectives.shapes import fill_masked, require_same_shape

Scalar = int | float | Float[Tensor, ""]


def log_ratio(
    logprobs: Float[Tensor, "*batch"],
    old_logprobs: Float[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """log π(a|s) − log π_old(a|s), in nats; 0 where masked. Gradient flows into ``logprobs`` only.

    Shapes: all [...], alike. Raises ``ValueError`` if they differ.
    """
    require_same_shape(logprobs, old_logprobs=old_logprobs)
    return fill_masked(logprobs - old_logprobs.detach(), mask)


def ratio(
    logprobs: Float[Tensor, "*batch"],
    old_logprobs: Float[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """ρ = π(a|s) / π_old(a|s), the importance weight of one step; 1 where masked.

    Shapes: all [...], alike. Raises ``ValueError`` if they differ.
    """
    return log_ratio(logprobs, old_logprobs, mask).exp()


def sequence_ratio(
    logprobs: Float[Tensor, "*batch t"],
    old_logprobs: Float[Tensor, "*batch t"],
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch"]:
    """GSPO's ratio of a whole sequence: the geometric mean of its tokens' ratios.

        s_i = (π(y_i|x) / π_old(y_i|x))^{1/|y_i|} = exp(1/|y_i| · Σ_t log ρ_it)

    The root keeps it near 1 at any length, so clip ranges are of the order 1e-4; it is not an importance weight.
    Shapes: [..., T] → [...]; 1 for a sequence without scored tokens. Raises ``ValueError`` if the shapes differ.
    Source: Zheng et al. 2025 (arXiv 2507.18071), the definition of s_i(θ).
    """
    return _mean_log_ratio(logprobs, old_logprobs, mask).exp()


def sequence_ratio_per_token(
    logprobs: Float[Tensor, "*batch t"],
    old_logprobs: Float[Tensor, "*batch t"],
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """GSPO-token's ratio: the value of the sequence's ratio, the gradient of each token's own.

        s_it = sg[s_i] · π(y_it) / sg[π(y_it)]

    Lets advantages differ from token to token. With one advantage per sequence and ``sequence_mean`` the gradient is
    GSPO's. Shapes: [..., T]; 1 where masked. Raises ``ValueError`` if the shapes differ.
    Source: Zheng et al. 2025 (arXiv 2507.18071), GSPO-token.
    """
    value = sequence_ratio(logprobs, old_logprobs, mask).detach().unsqueeze(-1)
    # exp(x − sg[x]) is 1 and has the gradient of x.
    scored = fill_masked(logprobs, mask)
    per_token = value * (scored - scored.detach()).exp()
    return fill_masked(per_token, mask, 1.0)


def reinforce(logprobs: Float[Tensor, "*batch"], advantages: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """REINFORCE: the log-prob of each action, weighted with how good it turned out.

        L_t = −A_t · log π(a_t|s_t)

    With discounted returns-to-go in A, summed over an episode, the expected gradient is **not** that of the discounted
    return, because states that are reached late weigh as much as early ones (that is ``reinforce_discounted``). With
    γ = 1 the two are one. This form is the one nearly every implementation uses.
    Shapes: [...], alike; per step, or per sequence with sequence log-probs. Raises ``ValueError`` if they differ.
    Source: Williams 1992; on the missing γ^t: Thomas 2014 ("Bias in natural actor-critic algorithms").
    """
    require_same_shape(logprobs, advantages=advantages)
    return -advantages.detach() * logprobs


def reinforce_discounted(
    logprobs: Float[Tensor, "*batch t"],
    advantages: Float[Tensor, "*batch t"],
    elapsed_discounts: Float[Tensor, "*batch t"],
) -> Float[Tensor, "*batch t"]:
    """REINFORCE with γ^t in front of the score: the gradient of the discounted return J_γ.

        L_t = −γ^t · A_t · log π(a_t|s_t)

    ``elapsed_discounts`` γ^t come from ``returns.elapsed_discounts``. With discounted returns-to-go in A, summed over
    an episode, the expected gradient of the loss is −∇J_γ exactly. Shapes: [..., T], alike.
    Raises ``ValueError`` if they differ.
    Source: Sutton & Barto 2018, §13.3; Sutton et al. 2000 (policy gradient theorem).
    """
    require_same_shape(logprobs, elapsed_discounts=elapsed_discounts)
    return elapsed_discounts.detach() * reinforce(logprobs, advantages)


def surrogate(ratio: Float[Tensor, "*batch"], advantages: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The importance-sampled gain of one policy over another, from the other's steps: L = −ρ·A.

    Without bound: a good action is pushed as far as the optimiser goes, though the steps say little of policies far
    from the one that took them. Shapes: [...], alike. Raises ``ValueError`` if they differ.
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 6 (Kakade & Langford 2002).
    """
    require_same_shape(ratio, advantages=advantages)
    return -ratio * advantages.detach()


def clipped_surrogate(
    ratio: Float[Tensor, "*batch"],
    advantages: Float[Tensor, "*batch"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "*batch"]:
    """PPO's clipped surrogate: no gain from moving the ratio further than the range allows.

        L = −min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A)

    A pessimistic bound: steps that already moved too far in the direction of their advantage have gradient 0, steps
    that moved the wrong way keep theirs. PPO: both 0.2. DAPO's "clip higher": 0.2 and 0.28. GSPO: 3e-4 and 4e-4 on
    ``sequence_ratio``. Shapes: [...], alike.
    Raises ``ValueError`` if they differ, or unless 0 ≤ ε_low ≤ 1 and 0 ≤ ε_high.
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; two-sided ranges: Yu et al. 2025 (arXiv 2503.14476).
    """
    require_same_shape(ratio, advantages=advantages)
    _clip_range(clip_low, clip_high)
    gain = advantages.detach()
    return -torch.minimum(ratio * gain, ratio.clamp(1 - clip_low, 1 + clip_high) * gain)


def dual_clipped_surrogate(
    ratio: Float[Tensor, "*batch"],
    advantages: Float[Tensor, "*batch"],
    *,
    clip_low: float,
    clip_high: float,
    clip_ratio: float,
) -> Float[Tensor, "*batch"]:
    """The clipped surrogate, bounded for negative advantages too.

        L = −max(min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A), c·A)   where A < 0,   the clipped surrogate elsewhere

    For A < 0 the plain surrogate grows without limit with ρ; here steps with ρ > c have gradient 0.
    ``clip_ratio`` c > 1, usually 3. Shapes: [...], alike.
    Raises ``ValueError`` if they differ, or unless 0 ≤ ε_low ≤ 1, 0 ≤ ε_high and c > 1 + ε_high.
    Source: Ye et al. 2020 (arXiv 1912.09729).
    """
    if clip_ratio <= 1 + clip_high:
        raise ValueError(f"clip_ratio {clip_ratio} has to lie above 1 + clip_high = {1 + clip_high}")
    loss = clipped_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    gain = advantages.detach()
    return torch.where(gain < 0, torch.minimum(loss, -clip_ratio * gain), loss)


def clipped(
    ratio: Float[Tensor, "*batch"],
    advantages: Float[Tensor, "*batch"],
    *,
    clip_low: float,
    clip_high: float,
) -> Bool[Tensor, "*batch"]:
    """Where ``clipped_surrogate`` has no gradient: beyond the range, in the direction of the advantage.

        (ρ > 1 + ε_high and A > 0)  or  (ρ < 1 − ε_low and A < 0)

    Its mean over scored steps is the metric ``clip_fraction``. Shapes: [...], alike. Raises as ``clipped_surrogate``.
    """
    require_same_shape(ratio, advantages=advantages)
    _clip_range(clip_low, clip_high)
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))


def kl_penalized_surrogate(
    ratio: Float[Tensor, "*batch"],
    advantages: Float[Tensor, "*batch"],
    kl: Float[Tensor, "*batch"],
    *,
    kl_coef: Scalar | Float[Tensor, "*#batch"],
) -> Float[Tensor, "*batch"]:
    """PPO's other surrogate: the unclipped one, with a penalty on the distance to the policy that sampled.

        L = −(ρ·A − β · KL[π_old(·|s), π(·|s)])

    ``kl`` per step with its gradient, exact from ``divergence.categorical_kl`` (old policy first). β stays fixed, or
    moves with ``adapt_kl_penalty``. On-policy the KL's gradient is 0, so the gradient is that of REINFORCE.
    Shapes: [...], alike; β one number, or one for each run or step (broadcast). Raises ``ValueError`` if they differ.
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 8.
    """
    require_same_shape(ratio, kl=kl)
    return surrogate(ratio, advantages) + kl_coef * kl


def cispo(
    logprobs: Float[Tensor, "*batch"],
    ratio: Float[Tensor, "*batch"],
    advantages: Float[Tensor, "*batch"],
    *,
    clip_high: float,
    clip_low: float | None = None,
) -> Float[Tensor, "*batch"]:
    """REINFORCE with a clipped importance weight: every step keeps a gradient, however far its ratio went.

        L = −sg[clip(ρ, 1 − ε_low, 1 + ε_high)] · A · log π(a|s)

    ``clip_low`` None: no lower bound, as its authors ran it. Shapes: [...], alike.
    Raises ``ValueError`` if they differ, or unless 0 ≤ ε_low ≤ 1 and 0 ≤ ε_high.
    Source: MiniMax 2025 (MiniMax-M1, arXiv 2506.13585).
    """
    require_same_shape(logprobs, ratio=ratio)
    low = 1.0 if clip_low is None else clip_low
    _clip_range(low, clip_high)
    weight = ratio.detach().clamp(1 - low, 1 + clip_high)
    return weight * reinforce(logprobs, advantages)


def truncated_weights(ratio: Float[Tensor, "*batch"], *, cap: int | float) -> Float[Tensor, "*batch"]:
    """Truncated importance sampling: weights for samples of another policy, bounded from above.

        w = sg[min(ρ, C)],    ρ = π_old(a|s) / μ(a|s)

    μ is what really sampled (an engine in another precision, with another kernel), π_old the same policy as the trainer
    computes it. Multiply advantages or losses with w: without the cap the mean is that under π_old, exactly per step;
    the cap trades a little bias for a bounded variance. C ≥ 1, usually 2. Constant: no gradient flows through it.
    Shapes: [...]. Raises ``ValueError`` unless C ≥ 1.
    Source: Ionides 2008 (truncated importance sampling).
    """
    _cap(cap)
    return ratio.detach().clamp(max=cap)


def masked_weights(ratio: Float[Tensor, "*batch"], *, cap: int | float) -> Float[Tensor, "*batch"]:
    """Masked importance sampling: a sample that the two policies see too differently takes no part.

        w = sg[ρ] if 1/C ≤ ρ ≤ C, else 0,    ρ = π_old(a|s) / μ(a|s)

    As ``truncated_weights``, but what lies outside the range is left out instead of cut to it, on both sides: there the
    sampler's numbers are taken to be wrong, not merely different. Shapes: [...]. Raises ``ValueError`` unless C ≥ 1.
    Source: the token-level masking of Ling Team 2025 ("Every step evolves", arXiv 2510.18855).
    """
    _cap(cap)
    weight = ratio.detach()
    return torch.where((weight <= cap) & (weight * cap >= 1), weight, 0.0)


def adapt_kl_penalty(kl_coef: float, kl: float, target: float) -> float:
    """PPO's controller for β in ``kl_penalized_surrogate``, after each policy update.

        β/2 if KL < target/1.5,    2β if KL > 1.5·target,    else β

    ``kl``: the mean KL[π_old, π] that the update brought about, in nats per step: distance to the policy that
    *sampled*. Not the leash to the reference model (``adapt_kl_leash``).
    Raises ``ValueError`` unless the target is positive.
    Source: Schulman et al. 2017 (arXiv 1707.06347), §4.
    """
    _positive_target(target)
    if kl < target / 1.5:
        return kl_coef / 2
    return kl_coef * 2 if kl > target * 1.5 else kl_coef


def adapt_kl_leash(kl_coef: float, kl: float, target: float, *, gain: float = 0.1) -> float:
    """RLHF's controller for the coefficient of the KL to the *reference* model: proportional, in log-space.

        e = clip((KL − target)/target, −0.2, 0.2),    β' = β · (1 + K·e)

    ``kl``: mean KL[π, π_ref] of this batch in nats per sequence; ``target`` alike; ``gain`` K per update.
    Raises ``ValueError`` unless the target is positive.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), §2.2.
    """
    _positive_target(target)
    error = min(max((kl - target) / target, -0.2), 0.2)
    return kl_coef * (1 + gain * error)


def _mean_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor | None) -> Tensor:
    ratios = log_ratio(logprobs, old_logprobs, mask)
    if mask is None:
        return ratios.mean(-1)
    return ratios.sum(-1) / mask.sum(-1).clamp(min=1)


def _clip_range(clip_low: float, clip_high: float) -> None:
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"need 0 ≤ clip_low ≤ 1 and clip_high ≥ 0, not {clip_low} and {clip_high}")


def _cap(cap: int | float) -> None:
    if not cap >= 1:
        raise ValueError(f"the cap of a weight has to be at least 1, not {cap}")


def _positive_target(target: float) -> None:
    if not target > 0:
        raise ValueError(f"the KL target has to be positive, not {target}")
