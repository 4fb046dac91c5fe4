"""Derivatives of losses, by hand: for learners so small that autograd's bookkeeping would be most of their work.

Of a loss, the derivative of the one of the same name with respect to its first argument, entry by entry: what autograd
gives for the loss's sum. Surrogates are differentiated with respect to log π(a|s), through the ratio: ∂ρ/∂log π = ρ.
Where two branches of a loss are equally large they agree on the derivative, except on sets of measure zero.

``softmax`` and ``gaussian`` lead on from there to what a policy's distribution is made of.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trueup.objectives import policy_gradient
from trueup.objectives.gaussian import require_spread
from trueup.objectives.shapes import require_not_negative, require_positive, require_same_shape


def reinforce(logprobs: Float[Tensor, "*batch"], advantages: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """∂/∂log π of ``policy_gradient.reinforce``: −A. Shapes: [...], alike. Raises ``ValueError`` if they differ."""
    require_same_shape(logprobs, advantages=advantages)
    return -advantages


def surrogate(ratio: Float[Tensor, "*batch"], advantages: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """∂/∂log π of ``policy_gradient.surrogate``: −ρ·A, itself.

    That of ``kl_penalized_surrogate`` too, whose other part has ∂/∂KL = β. Shapes: [...], alike.
    Raises ``ValueError`` if they differ.
    """
    return policy_gradient.surrogate(ratio, advantages)


def clipped_surrogate(
    ratio: Float[Tensor, "*batch"], advantages: Float[Tensor, "*batch"], *, clip_low: float, clip_high: float
) -> Float[Tensor, "*batch"]:
    """∂/∂log π of ``policy_gradient.clipped_surrogate``: −ρ·A, and 0 where ``policy_gradient.clipped``.

    Shapes: [...], alike. Raises ``ValueError`` as ``clipped_surrogate``.
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7.
    """
    out = policy_gradient.clipped(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    return surrogate(ratio, advantages).masked_fill(out, 0.0)


def value_loss(values: Float[Tensor, "*batch"], returns: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """∂/∂V of ``value.value_loss``: V − G. Shapes: [...], alike. Raises ``ValueError`` if they differ."""
    require_same_shape(values, returns=returns)
    return values - returns


def clipped_value_loss(
    values: Float[Tensor, "*batch"],
    old_values: Float[Tensor, "*batch"],
    returns: Float[Tensor, "*batch"],
    *,
    clip: float,
) -> Float[Tensor, "*batch"]:
    """∂/∂V of ``value.clipped_value_loss``.

        V − G where |V − V_old| ≤ ε or (V − G)² > (V_c − G)²,    else 0        (V_c = V_old + clip(V − V_old, −ε, ε))

    Shapes: [...], alike. Raises ``ValueError`` as ``clipped_value_loss``. Source: as there.
    """
    require_not_negative("clip", clip)
    require_same_shape(values, old_values=old_values, returns=returns)
    moved, error = values - old_values, values - returns
    near = moved.clamp(-clip, clip) + (old_values - returns)
    return error.masked_fill((moved.abs() > clip) & (near.abs() >= error.abs()), 0.0)


def huber_value_loss(
    values: Float[Tensor, "*batch"], returns: Float[Tensor, "*batch"], *, delta: float = 1.0
) -> Float[Tensor, "*batch"]:
    """∂/∂V of ``value.huber_value_loss``: V − G, at most δ in size.

    Shapes: [...], alike. Raises ``ValueError`` if they differ or δ isn't positive. Source: Huber 1964.
    """
    require_positive("delta", delta)
    return value_loss(values, returns).clamp(-delta, delta)


def softmax(
    logprobs: Float[Tensor, "*batch v"],
    targets: Int[Tensor, "*batch"],
    *,
    by_logprobs: Float[Tensor, "*batch"],
    by_entropy: Float[Tensor, "*batch"] | None = None,
    by_kl: Float[Tensor, "*batch"] | None = None,
    old_logprobs: Float[Tensor, "*batch v"] | None = None,
) -> Float[Tensor, "*batch v"]:
    """∂/∂z of a loss from its derivatives by the targets' log-probs, the entropy and KL(p_old‖p), p = softmax(z).

        ∂log p(t)/∂z = 1_t − p,    ∂H/∂z = −p·(log p + H),    ∂KL(p_old‖p)/∂z = p − p_old

    ``logprobs`` and ``old_logprobs`` are normalised, log p = log_softmax(z). What isn't part of the loss is None;
    ``by_kl`` needs ``old_logprobs``, which take no part in it: it raises ``ValueError`` without. Shapes: these
    [..., V], all others [...]. Of ``logprobs.token_logprobs``, ``logprobs.entropy`` and ``divergence.categorical_kl``.
    """
    require_same_shape(targets, by_logprobs=by_logprobs, by_entropy=by_entropy, by_kl=by_kl)
    require_same_shape(logprobs, old_logprobs=old_logprobs)
    probabilities = logprobs.exp()
    error = probabilities * -by_logprobs.unsqueeze(-1)
    error.scatter_add_(-1, targets.unsqueeze(-1), by_logprobs.unsqueeze(-1))
    if by_entropy is not None:
        weighted = probabilities * logprobs
        error -= by_entropy.unsqueeze(-1) * (weighted - probabilities * weighted.sum(-1, keepdim=True))
    if by_kl is not None:
        if old_logprobs is None:
            raise ValueError("by_kl needs old_logprobs")
        error += by_kl.unsqueeze(-1) * (probabilities - old_logprobs.exp())
    return error


def gaussian(
    mean: Float[Tensor, "*batch k"],
    log_std: Float[Tensor, "*#batch k"],
    values: Float[Tensor, "*batch k"],
    *,
    by_logprobs: Float[Tensor, "*batch"],
    by_entropy: Float[Tensor, "*batch"] | None = None,
    by_kl: Float[Tensor, "*batch"] | None = None,
    old: tuple[Float[Tensor, "*batch k"], Float[Tensor, "*#batch k"]] | None = None,
) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*#batch k"]]:
    """∂/∂μ and ∂/∂log σ of a loss from its derivatives by the values' log-probs, the entropy and KL(p_old‖p).

        ∂log p(x)/∂μ = z/σ,    ∂log p(x)/∂log σ = z² − 1,    z = (x − μ)/σ,    ∂H/∂log σ = 1
        ∂KL(p_old‖p)/∂μ = (μ − μ_old)/σ²,    ∂KL(p_old‖p)/∂log σ = 1 − (σ_old² + (μ − μ_old)²)/σ²

    Summed over the entries that a log σ stands for, where it was broadcast. What isn't part of the loss is None;
    ``by_kl`` needs ``old``, mean and log σ, which take no part in it: it raises ``ValueError`` without. Shapes: as the
    functions of ``gaussian`` have them, whose derivatives these are.
    """
    require_same_shape(mean, values=values)
    require_spread(mean, log_std=log_std)
    require_same_shape(by_logprobs, by_entropy=by_entropy, by_kl=by_kl)
    inverse = torch.exp(-log_std)
    scaled = (values - mean) * inverse
    by_logprobs = by_logprobs.unsqueeze(-1)
    by_mean = by_logprobs * scaled * inverse
    by_log_std = by_logprobs * (scaled * scaled - 1)
    if by_entropy is not None:
        by_log_std = by_log_std + by_entropy.unsqueeze(-1)
    if by_kl is not None:
        if old is None:
            raise ValueError("by_kl needs old")
        old_mean, old_log_std = old
        apart = (mean - old_mean) * inverse
        by_mean = by_mean + by_kl.unsqueeze(-1) * apart * inverse
        wide = torch.exp(2 * (old_log_std - log_std)) + apart * apart
        by_log_std = by_log_std + by_kl.unsqueeze(-1) * (1 - wide)
    return by_mean, by_log_std.sum_to_size(log_std.shape)
