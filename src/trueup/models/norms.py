"""RMS norms whose backward pass is one sweep over memory in place of a dozen."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 512
"""Rows of a sweep: what is worked out for them stays in a core's cache."""


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
def _swept(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of norms ``kind`` with the backward pass of this module, on a CPU and in training."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type != "cpu" or not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return kind.forward(self, hidden_states)
        return _RMSNorm.apply(hidden_states, self.weight, _epsilon(self))  # pyright: ignore[reportReturnType]

    return type(kind.__name__, (kind,), {"forward": forward, "swept": True, "__module__": kind.__module__})


def _epsilon(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def sweep_norms(model: nn.Module) -> None:
    """Give the model's RMS norms the backward pass of this module, where it is theirs: a norm of another form (Gemma's
    1 + w, a gate) stays as it is, for the two are compared on random numbers first. Every result stays the same."""
    for norm in model.modules():
        kind = type(norm)
        weight = getattr(norm, "weight", None)
        if not kind.__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or _epsilon(norm) is None:
            continue
        if weight.device.type == "cpu" and not hasattr(kind, "swept") and _is_plain(norm):
            norm.__class__ = _swept(kind)


def _is_plain(norm: Any) -> bool:
    """Whether the norm computes w∘x/√(mean x² + ε), rounded as above, and nothing else."""
    trial = torch.randn(3, norm.weight.numel(), generator=torch.Generator().manual_seed(0)).to(norm.weight.dtype)
    try:
        with torch.no_grad():
            return torch.equal(norm(trial), _RMSNorm.apply(trial, norm.weight, _epsilon(norm)))  # pyright: ignore
    except (TypeError, RuntimeError):
        return False
