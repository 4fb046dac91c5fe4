"""Enumerable preference problems, and an optimiser that finds their minimisers to the last digits of float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

NUM_RESPONSES = 5


class Preferences(NamedTuple):
    """All pairs of five responses, labelled by Bradley–Terry: nothing is sampled, so the minimiser is the truth."""

    rewards: Tensor
    ref: Tensor
    """log π_ref"""
    first: Tensor
    second: Tensor
    """The two responses of each pair."""
    first_wins: Tensor
    """Probability of that label."""
    weights: Tensor
    """How often each pair occurs."""

    def loss(self, pair_loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The population loss of ``pair_loss(chosen, rejected)``, which takes indices of responses."""
        either_label = self.first_wins * pair_loss(self.first, self.second) + (1 - self.first_wins) * pair_loss(
            self.second, self.first
        )
        return (self.weights * either_label).sum()


def _preferences(seed: int) -> Preferences:
    def normal(size: int, seed: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    rewards, ref = normal(NUM_RESPONSES, seed), normal(NUM_RESPONSES, seed + 1).log_softmax(-1)
    first, second = torch.combinations(torch.arange(NUM_RESPONSES)).unbind(-1)
    weights = normal(len(first), seed + 2).exp()
    return Preferences(rewards, ref, first, second, torch.sigmoid(rewards[first] - rewards[second]), weights)


def _newton(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """A minimiser of a smooth loss that may be flat along a constant shift, and need not be convex on the way."""
    x = start.clone()
    for _ in range(60):
        gradient = torch.autograd.functional.jacobian(loss, x)
        if gradient.abs().max() < 1e-13:
            return x
        curvatures, directions = torch.linalg.eigh(torch.autograd.functional.hessian(loss, x))
        # Downhill in every direction, whichever way it curves; not at all where it is flat.
        sizes = curvatures.abs()
        inverse = torch.where(sizes > 1e-13 * sizes.max(), 1 / sizes, 0.0)
        step = directions @ (inverse * (directions.T @ gradient))
        size = 1.0
        while size > 1e-6 and loss(x - size * step) > loss(x):
            size /= 2
        x = x - size * step
    assert gradient.abs().max() < 1e-10, "Newton's method has not converged"
    return x


@pytest.fixture(scope="session")
def preferences() -> Callable[[int], Preferences]:
    return _preferences


@pytest.fixture(scope="session")
def newton() -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    return _newton
