"""What every objective checks on its own, where no run-time checker of annotations is installed."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from trueup.objectives.reduce import token_mean
from trueup.objectives.shapes import fill_masked, require_same_shape


def test_require_same_shape_names_the_argument() -> None:
    x = torch.zeros(2, 3)
    require_same_shape(x, other=torch.ones(2, 3), absent=None)
    with pytest.raises(ValueError, match=r"values has the shape \(2,\), expected \(2, 3\)"):
        require_same_shape(x, other=x, values=torch.zeros(2))


def test_annotated_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeCheckError):
        token_mean(torch.zeros(2, 3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeCheckError):
        token_mean(torch.zeros(2, 3), torch.ones(2, 3))


def test_fill_masked() -> None:
    x = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    assert fill_masked(x, None) is x
    assert fill_masked(x, mask).tolist() == [1, 0, 3]
    assert fill_masked(x, mask, 7.0).tolist() == [1, 7, 3]
    (gradient,) = torch.autograd.grad(fill_masked(x, mask).square().sum(), x)
    assert gradient.tolist() == [2, 0, 6]
    with pytest.raises(ValueError, match="mask"):
        fill_masked(x, mask[:2])
