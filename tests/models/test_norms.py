"""The swept RMS norm is transformers' own: to the bit forwards, to rounding backwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trueup.models import norms
from trueup.models.norms import swap_norms

DIM = 24


def plain(dtype: torch.dtype = torch.float32, kind: Any = LlamaRMSNorm) -> nn.Module:
    norm = kind(DIM, eps=1e-3)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    return norm.to(dtype)


def swept(dtype: torch.dtype = torch.float32) -> nn.Module:
    norm = plain(dtype)
    swap_norms(norm)
    return norm


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 2), (0,)])
def test_forward_is_transformers_own_to_the_bit(monkeypatch, dtype, shape) -> None:
    monkeypatch.setattr(norms, "ROWS", 3)
    x = draw(*shape).to(dtype)
    assert torch.equal(swept(dtype)(x.requires_grad_()), plain(dtype)(x))


def test_gradient_is_that_of_the_definition(monkeypatch) -> None:
    """float64 finite differences, over sweeps that don't divide the rows."""
    monkeypatch.setattr(norms, "ROWS", 3)
    norm = plain(torch.float64)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norms._RMSNorm.apply(x, weight, norm.variance_epsilon)

    x, weight = draw(2, 4).double().requires_grad_(), norm.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(normed, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_closer_to_the_truth_than_autograd_of_the_plain_norm(dtype) -> None:
    x, grad = draw(1, 1200).to(dtype), draw(1, 1200, seed=2).to(dtype)

    def gradients(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(norm(x), [x, norm.weight], grad.to(x.dtype))

    found, theirs = gradients(swept(dtype), x), gradients(plain(dtype), x)
    norm = plain(dtype).double()
    wide = x.double().requires_grad_()
    out = norm.weight * wide * (wide.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    truth = torch.autograd.grad(out, [wide, norm.weight], grad.double())
    for mine, their, true in zip(found, theirs, truth, strict=True):
        error, their_error = ((each.double() - true).norm() / true.norm() for each in (mine, their))
        assert error < 1.05 * their_error + 1e-6


def test_other_norms_are_left_alone() -> None:
    """Gemma multiplies by 1 + w."""
    model = nn.Sequential(plain(kind=Gemma2RMSNorm), nn.Linear(DIM, DIM))
    kinds = [type(module) for module in model]
    swap_norms(model)
    assert [type(module) for module in model] == kinds


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, nn.LayerNorm])
def test_a_float32_stream_beside_bfloat16_weights_is_rounded_once(kind, learning) -> None:
    norm = plain(torch.bfloat16, kind)
    wide = copy.deepcopy(norm).float()
    swap_norms(norm)
    x = draw(2, 3).requires_grad_(learning)
    found = norm(x)
    assert torch.equal(found, wide(x).bfloat16())
    if learning:
        grad = draw(2, 3, seed=2)
        (mine,), (true,) = (torch.autograd.grad(out, x, grad.to(out.dtype)) for out in (found, wide(x)))
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, true, rtol=0, atol=2**-7 * float(true.abs().max()))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_a_layer_norm_in_one_type_is_pytorchs(options) -> None:
    norm = nn.LayerNorm(DIM, **options)
    x = draw(2, 3)
    expected = norm(x)
    swap_norms(norm)
    assert torch.equal(norm(x), expected)
    assert isinstance(norm, nn.LayerNorm)


def test_a_copy_has_weights_of_its_own() -> None:
    norm = swept()
    copied = copy.deepcopy(norm)
    with torch.no_grad():
        norm.weight.zero_()
    x = draw(1, 2).requires_grad_()
    assert not norm(x).any()
    assert torch.equal(copied(x), plain()(x))
    assert isinstance(copied, LlamaRMSNorm)
    assert list(copied.state_dict()) == ["weight"]


def test_sweeping_twice_is_sweeping_once() -> None:
    norm = swept()
    kind = type(norm)
    swap_norms(norm)
    assert type(norm) is kind
