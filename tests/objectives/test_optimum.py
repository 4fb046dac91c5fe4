"""The KL-regularised optimum and best-of-n, against definitions written out by brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from trueup.objectives.optimum import best_of_n_kl_bound, best_of_n_probs, kl_regularized_optimum


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kl(logprobs: Tensor, ref_logprobs: Tensor) -> float:
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1).item()


def test_optimum_golden() -> None:
    # reference 1/2, 1/4, 1/4; exp(r/β) = 1, 2, 4: weights 2, 2, 4 of 8 over 4
    ref, rewards = t(0.5, 0.25, 0.25).log(), 3 * t(1, 2, 4).log()
    logprobs, log_partition = kl_regularized_optimum(ref, rewards, 3.0)
    assert logprobs.exp().tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert log_partition.exp().item() == pytest.approx(2)


@pytest.mark.parametrize("beta", [0.05, 1.0, 20.0])
def test_optimum_is_the_maximum_and_its_value_is_beta_log_z(beta: float) -> None:
    rewards, ref = random_normal(6), random_normal(6, seed=1).log_softmax(-1)

    def objective(logprobs: Tensor) -> Tensor:
        return (logprobs.exp() * (rewards - beta * (logprobs - ref))).sum()

    optimum, log_partition = kl_regularized_optimum(ref, rewards, beta)
    best = objective(optimum)
    assert best.item() == pytest.approx(beta * log_partition.item(), rel=1e-12)
    gradient = torch.autograd.functional.jacobian(lambda logits: objective(logits.log_softmax(-1)), optimum)
    assert gradient.abs().max() < 1e-12
    # every other policy is worse by exactly β·KL to the optimum
    other = random_normal(6, seed=2).log_softmax(-1)
    assert (best - objective(other)).item() == pytest.approx(beta * kl(other, optimum), rel=1e-10)


def test_optimum_keeps_to_the_support_and_to_batches() -> None:
    ref = torch.stack([t(0.5, 0.5, 0).log(), t(0.2, 0.3, 0.5).log()])
    rewards = torch.stack([t(0, 1, 1e4), t(1e4, 1e4, 0)])
    logprobs, log_partition = kl_regularized_optimum(ref, rewards, 1.0)
    assert logprobs.shape == (2, 3)
    assert log_partition.shape == (2,)
    assert logprobs[0].exp().tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e), 0])
    assert logprobs[1].exp().tolist() == pytest.approx([0.4, 0.6, 0])


def test_optimum_gradient() -> None:
    ref, rewards = random_normal(2, 4).requires_grad_(), random_normal(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda ref, rewards: kl_regularized_optimum(ref, rewards, 0.7), (ref, rewards))


def best_of_all_draws(probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Every sequence of n draws with its probability; its best, the earliest among equals, gets it."""
    total = torch.zeros_like(probs)
    for draws in itertools.product(range(len(probs)), repeat=n):
        winner = max(draws, key=lambda y: rewards[y].item())  # max keeps the first of equals
        total[winner] += probs[list(draws)].prod()
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_by_brute_force(n: int) -> None:
    probs = random_normal(4).softmax(-1)
    for rewards in (t(0.3, -1, 2, 0.5), t(1, 0, 1, 0), t(1, 1, 1, 1)):
        expected = best_of_all_draws(probs, rewards, n)
        torch.testing.assert_close(best_of_n_probs(probs, rewards, n), expected, rtol=1e-12, atol=1e-14)


def test_best_of_n_edges() -> None:
    probs = torch.stack([t(0.2, 0.3, 0.5), t(0, 0, 1)])
    rewards = torch.stack([t(1, 2, 3), t(9, 5, 1)])
    assert torch.equal(best_of_n_probs(probs, rewards, 1), probs)
    many = best_of_n_probs(probs, rewards, 200)
    torch.testing.assert_close(many, torch.stack([t(0, 0, 1), t(0, 0, 1)]))
    torch.testing.assert_close(best_of_n_probs(probs, rewards, 3).sum(-1), t(1, 1))
    assert torch.autograd.gradcheck(
        lambda p: best_of_n_probs(p, rewards, 3), (random_normal(2, 3).softmax(-1).requires_grad_(),)
    )


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("size", [2, 5, 50])
def test_best_of_n_kl_lies_under_the_bound(n: int, size: int) -> None:
    probs, rewards = random_normal(size, seed=n).softmax(-1), random_normal(size, seed=n + 1)
    best = best_of_n_probs(probs, rewards, n).clamp(min=1e-300).log()
    assert -1e-12 <= kl(best, probs.log()) <= best_of_n_kl_bound(n) + 1e-12


def test_bound_is_met_by_many_small_probabilities() -> None:
    probs = torch.full((4000,), 1 / 4000, dtype=torch.float64)
    best = best_of_n_probs(probs, torch.arange(4000, dtype=torch.float64), 8)
    assert kl(best.clamp(min=1e-300).log(), probs.log()) == pytest.approx(best_of_n_kl_bound(8), abs=1e-3)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_lies_below_the_optimal_frontier(n: int) -> None:
    """At the KL that best-of-n spends, the tilted policy of the same KL earns more reward."""
    ref, rewards = random_normal(6, seed=n).log_softmax(-1), random_normal(6, seed=n + 1)
    best = best_of_n_probs(ref.exp(), rewards, n)
    spent = kl(best.log(), ref)
    low, high = 1e-3, 1e3  # β: KL falls as β grows
    for _ in range(200):
        beta = math.sqrt(low * high)
        optimum, _ = kl_regularized_optimum(ref, rewards, beta)
        low, high = (beta, high) if kl(optimum, ref) > spent else (low, beta)
    assert kl(optimum, ref) == pytest.approx(spent, rel=1e-9)
    gained = ((optimum.exp() - best) * rewards).sum().item()
    assert gained > 1e-4


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="beta must be positive"):
        kl_regularized_optimum(t(0, 0), t(0, 0), 0.0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n_probs(t(0.5, 0.5), t(0, 0), 0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n_kl_bound(0)
