"""Independent normal distributions, the policies of real-valued actions: log-prob, entropy, KL divergence.

The spread is given as log σ [..., K], which may be one vector [K] for all states: all but the last dimension broadcast.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from trueup.objectives.shapes import require_same_shape


def gaussian_logprobs(
    mean: Float[Tensor, "*batch k"], log_std: Float[Tensor, "*#batch k"], values: Float[Tensor, "*batch k"]
) -> Float[Tensor, "*batch"]:
    """Log-density of K independent normal values, in nats.

        log p(x) = Σ_k −½·((x_k − μ_k)/σ_k)² − log σ_k − ½·log 2π

    Shapes: ``mean`` and ``values`` [..., K], ``log_std`` the same or with less before its K → [...].
    Raises ``ValueError`` if mean and values differ in shape, or the spread in K.
    """
    require_same_shape(mean, values=values)
    require_spread(mean, log_std=log_std)
    scaled = (values - mean) * torch.exp(-log_std)
    constant = 0.5 * math.log(2 * math.pi) * mean.shape[-1]
    return -0.5 * (scaled * scaled).sum(-1) - (log_std.sum(-1) + constant)


def gaussian_entropy(log_std: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """Differential entropy of K independent normal values, in nats: Σ_k log σ_k + ½·log 2πe. [..., K] → [...]."""
    return log_std.sum(-1) + 0.5 * math.log(2 * math.pi * math.e) * log_std.shape[-1]


def gaussian_kl(
    mean: Float[Tensor, "*batch k"],
    log_std: Float[Tensor, "*#batch k"],
    other_mean: Float[Tensor, "*batch k"],
    other_log_std: Float[Tensor, "*#batch k"],
) -> Float[Tensor, "*batch"]:
    """The exact KL divergence of two of them, in nats.

        KL(p‖q) = Σ_k log σ'_k/σ_k + (σ_k² + (μ_k − μ'_k)²)/(2σ'_k²) − ½        p: μ, σ;  q: μ', σ'

    Shapes: means [..., K], log σ the same or with less before their K → [...]. Gradient flows into all four.
    Raises ``ValueError`` if the means differ in shape, or the spreads in K.
    Source: Kullback 1959, ch. 9 (K one-dimensional cases).
    """
    require_same_shape(mean, other_mean=other_mean)
    require_spread(mean, log_std=log_std, other_log_std=other_log_std)
    gap = other_log_std - log_std
    apart = ((mean - other_mean) * torch.exp(-other_log_std)).square()
    return (gap + 0.5 * (torch.exp(-2 * gap) + apart) - 0.5).sum(-1)


def require_spread(mean: Tensor, **log_stds: Tensor) -> None:
    """Raise ``ValueError``, naming the argument, unless there is a log σ for each of the K values: one for all of them
    would be counted once in a sum over K."""
    for name, log_std in log_stds.items():
        if log_std.shape[-1] != mean.shape[-1]:
            raise ValueError(
                f"{name} has the shape {tuple(log_std.shape)}, expected {mean.shape[-1]} in the last place"
            )
