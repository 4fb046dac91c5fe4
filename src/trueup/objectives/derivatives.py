"""Derivatives of losses, by hand: for learners so small that autograd's bookkeeping would be most of their work.

Each is the derivative of the loss of the same name with respect to its first argument, entry by entry: what autograd
gives for the loss's sum. Surrogates are differentiated with respect to log π(a|s), through the ratio: ∂ρ/∂log π = ρ.
Where two branches of a loss are equally large they agree on the derivative, except on sets of measure zero.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from trueup.objectives.policy_gradient import clipped
from trueup.objectives.shapes import require_same_shape


def reinforce(advantages: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """∂/∂log π of ``policy_gradient.reinforce``: −A. Shape: [...]. Source: Williams 1992."""
    return -advantages


def surrogate(ratio: Float[Tensor, "*batch"], advantages: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """∂/∂log π of the unclipped surrogate −ρ·A: itself.

    That of ``kl_penalized_surrogate`` too, whose other part has ∂/∂KL = β. Shapes: [...], alike.
    Raises ``ValueError`` if they differ. Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 6.
    """
    require_same_shape(ratio, advantages=advantages)
    return -ratio * advantages


def clipped_surrogate(
    ratio: Float[Tensor, "*batch"], advantages: Float[Tensor, "*batch"], *, clip_low: float, clip_high: float
) -> Float[Tensor, "*batch"]:
    """∂/∂log π of ``policy_gradient.clipped_surrogate``: −ρ·A, and 0 where ``policy_gradient.clipped``.

    Shapes: [...], alike. Raises ``ValueError`` as ``clipped_surrogate``.
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7.
    """
    out = clipped(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
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
    if clip < 0:
        raise ValueError(f"clip can't be negative, as {clip} is")
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
    if not delta > 0:
        raise ValueError(f"delta has to be positive, not {delta}")
    return value_loss(values, returns).clamp(-delta, delta)
