"""A faster form of a layer that most models have, for training on a CPU: the RMS norm.

Written out in PyTorch's operations, as transformers has it, its backward pass goes over memory a dozen times. A norm
gets the faster form where its own was found to compute the same on random numbers; every other one stays as it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 512
"""Rows that a norm works on at a time: what is worked out for them stays in a core's cache."""


def swap_norms(model: nn.Module) -> None:
    """Give the model's RMS norms the form of this module, where theirs compute the same.

    A norm's class becomes a subclass of it: weights, names, hooks and copies are what they were.
    """
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm") and not hasattr(kind, "swapped") and _is_plain(module):
            module.__class__ = _swapped(kind)


class _RMSNorm(torch.autograd.Function):
    """Sums and roots in float32 at least; what comes out is rounded where transformers rounds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        out, scales = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=wide)
        for part, result, scale in zip(rows.split(ROWS), out.split(ROWS), scales.split(ROWS), strict=True):
            part = part.to(wide)
            torch.rsqrt(part.square().mean(-1, keepdim=True) + epsilon, out=scale)
            torch.mul((part * scale).to(x.dtype), weight, out=result)
        ctx.save_for_backward(x, weight, scales)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """With n = x·s and g = grad∘w:  dx = s·(g − n·mean(g∘n)),  dw = Σ_rows grad∘n."""
        x, weight, scales = ctx.saved_tensors
        wide_weight = weight.to(scales.dtype)
        grad_x, grad_weight = torch.empty(x.shape, dtype=x.dtype), torch.zeros_like(wide_weight)
        rows = (each.reshape(-1, x.shape[-1]).split(ROWS) for each in (x, grad, grad_x))
        for part, g, result, scale in zip(*rows, scales.split(ROWS), strict=True):
            normed, g = part.to(scale.dtype) * scale, g.to(scale.dtype)
            products = g * normed
            grad_weight += products.sum(0)
            mean = (products @ wide_weight).div_(x.shape[-1]).unsqueeze(1)
            result.copy_((g * wide_weight).sub_(normed.mul_(mean)).mul_(scale))
        return grad_x, grad_weight.to(weight.dtype), None


@cache
def _swapped(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type != "cpu" or not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return kind.forward(self, hidden_states)
        return _RMSNorm.apply(hidden_states, self.weight, _epsilon(self))  # pyright: ignore[reportReturnType]

    return type(kind.__name__, (kind,), {"forward": forward, "swapped": True, "__module__": kind.__module__})


def _epsilon(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _is_plain(norm: Any) -> bool:
    """Whether it computes w∘x/√(mean x² + ε), rounded as above, and nothing else: no 1 + w, no gate."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or _epsilon(norm) is None:
        return False
    trial = torch.randn(3, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        with torch.no_grad():
            return torch.equal(norm(trial), _RMSNorm.apply(trial, weight, _epsilon(norm)))  # pyright: ignore
    except (TypeError, RuntimeError):
        return False
