"""What all objectives ask of their arguments: equal shapes, settings in range, masked entries that can't leak."""

from __future__ import annotations

import torch
from torch import Tensor


def require_same_shape(x: Tensor, **others: Tensor | None) -> None:
    """Raise ``ValueError``, naming the argument, unless all have the shape of ``x``; None is skipped.

    Broadcasting [N] against [N, T] would go unnoticed, and be wrong.
    """
    for name, other in others.items():
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name} has the shape {tuple(other.shape)}, expected {tuple(x.shape)}")


def fill_masked(x: Tensor, mask: Tensor | None, filling: float = 0.0) -> Tensor:
    """``x`` with ``filling`` where the mask is False: what stood there, NaN included, is gone, and so is its gradient.

    Raises ``ValueError`` if the shapes differ.
    """
    require_same_shape(x, mask=mask)
    return x if mask is None else torch.where(mask, x, filling)


def require_positive(name: str, value: float | int) -> None:
    """Raise ``ValueError``, naming the argument, unless it is above 0; NaN is not."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def require_not_negative(name: str, value: float) -> None:
    """Raise ``ValueError``, naming the argument, unless it is 0 or above; NaN is not."""
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")
