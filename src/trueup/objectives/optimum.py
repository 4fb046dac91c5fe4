"""Closed forms on response spaces small enough to list: what the trainers are held against.

The last axis runs over all responses y of one prompt. Probabilities and rewards are exact, so these are for tests,
certificates and teaching, not for training.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from trueup.objectives.shapes import require_same_shape


def kl_regularized_optimum(
    ref_logprobs: Float[Tensor, "*batch y"], rewards: Float[Tensor, "*batch y"], beta: float
) -> tuple[Float[Tensor, "*batch y"], Float[Tensor, "*batch"]]:
    """The policy that maximises E_π[r(y)] − β·KL(π‖π_ref), and its log partition function.

        π*(y) = π_ref(y)·exp(r(y)/β) / Z,   Z = Σ_y π_ref(y)·exp(r(y)/β)

    Returns ``(log π*, log Z)``. The maximum itself is β·log Z, if π_ref sums to 1. A response that π_ref excludes
    (log-probability −∞) stays excluded. Raises ``ValueError`` unless β > 0.
    Source: eq. 4 of Rafailov et al. 2023 (arXiv 2305.18290).
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    require_same_shape(ref_logprobs, rewards=rewards)
    tilted = ref_logprobs + rewards / beta
    log_partition = tilted.logsumexp(-1)
    return tilted - log_partition.unsqueeze(-1), log_partition


def best_of_n_probs(
    probs: Float[Tensor, "*batch y"], rewards: Float[Tensor, "*batch y"], n: int
) -> Float[Tensor, "*batch y"]:
    """The distribution of the best of n draws, by enumeration; among equal rewards the first draw wins.

        π_n(y) = π(y)·Σ_{i=0}^{n−1} F_<(y)^i·F_≤(y)^{n−1−i}

    F_<(y) and F_≤(y) are the probabilities that one draw has a lower, or no higher, reward than y. The i-th term says:
    i draws came before and were worse, then y, and the rest were no better. n = 1 is π itself.
    Takes memory of order Y². Raises ``ValueError`` for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    require_same_shape(probs, rewards=rewards)
    others, own = rewards.unsqueeze(-2), rewards.unsqueeze(-1)
    below = ((others < own) * probs.unsqueeze(-2)).sum(-1, keepdim=True)
    at_most = ((others <= own) * probs.unsqueeze(-2)).sum(-1, keepdim=True)
    before = torch.arange(n, device=probs.device)
    return probs * (below**before * at_most ** (n - 1 - before)).sum(-1)


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound, in nats, of the KL divergence between best-of-n and the policy it draws from.

        KL(π_n‖π) ≤ log n − (n − 1)/n

    The bound is met when rewards are all different and no single response has noticeable probability; on a small
    response space the true divergence is smaller. Raises ``ValueError`` for n < 1.
    Source: Beirami et al. 2024 (arXiv 2401.01879), who show that this often-quoted formula is a bound.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n
