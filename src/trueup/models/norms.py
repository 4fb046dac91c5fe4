"""Other forms of the norms that most models have.

RMS norms, on a CPU: written out in PyTorch's operations, as transformers has it, the backward pass goes over memory a
dozen times. A norm gets the faster form where its own was found to compute the same on random numbers; every other one
stays as it is. Layer norms: PyTorch's takes no input of more bits than its weights, which a residual stream in float32
is (``models.residual``).
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
    """Give the model's RMS norms the form of this module, where theirs compute the same, and its layer norms.

    A norm's class becomes a subclass of it: weights, names, hooks and copies are what they were. Both then take float32
    beside weights in half precision, and give the weights' type, rounded once.
    """
    for module in model.modules():
        kind = type(module)
        if kind is nn.LayerNorm:
            module.__class__ = LayerNorm
        elif kind.__name__.endswith("RMSNorm") and not hasattr(kind, "swapped") and _is_plain(module):
            module.__class__ = _swapped(kind)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, which also takes an input of more bits than its weights have."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is None or input.dtype == self.weight.dtype:
            return super().forward(input)
        weight, bias = (each if each is None else each.to(input.dtype) for each in (self.weight, self.bias))
        normed = nn.functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """Sums and roots in float32 at least; what comes out has the weight's type, and is rounded where transformers
    rounds it: before the weight too, if ``x`` is half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        out, scales = torch.empty_like(rows, dtype=weight.dtype), rows.new_empty(len(rows), 1, dtype=wide)
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
        learning = torch.is_grad_enabled() and hidden_states.requires_grad
        if hidden_states.device.type != "cpu" or not (learning or hidden_states.dtype != self.weight.dtype):
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
