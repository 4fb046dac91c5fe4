"""From per-token values to one number, with the denominator as an argument.

The three means weigh tokens differently and are different objectives: a mean of means is not a token mean. Every one of
them is a sum over tokens divided by something that doesn't depend on the parameters. Pass that something, counted over
the whole batch, as ``denominator``, and the results of micro-batches *add up* to the result of the one big batch.

Masked entries may hold anything, NaN included: they are replaced by 0 before summing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trueup.objectives.shapes import fill_masked

Denominator = int | float | Float[Tensor, ""] | Int[Tensor, ""]


def sequence_sum(
    values: Float[Tensor, "*batch t"], mask: Bool[Tensor, "*batch t"] | None = None
) -> Float[Tensor, "*batch"]:
    """Sum over the scored tokens of every sequence.

        S_i = Σ_t m_it · x_it

    Shapes: values and mask [..., T] → [...]. Units: those of ``values``.
    With ``values`` = token log-probs this is the log-probability of the sequence; its plain mean over samples is the
    reduction of REINFORCE and RLOO (Williams 1992; Ahmadian et al. 2024, arXiv 2402.14740).
    Raises ``ValueError`` if the shapes differ.
    """
    return fill_masked(values, mask).sum(-1)


def token_mean(
    values: Float[Tensor, "*batch t"],
    mask: Bool[Tensor, "*batch t"] | None = None,
    denominator: Denominator | None = None,
) -> Float[Tensor, ""]:
    """Mean over all scored tokens: every token weighs the same, so a long sequence weighs more.

        L = 1/D · Σ_i Σ_t m_it · x_it,    D = Σ_i Σ_t m_it unless given

    Shapes: values and mask [..., T] → scalar. ``denominator``: scored tokens in the whole batch, for micro-batches.
    Without any scored token the result is 0. The reduction of PPO and DAPO (Yu et al. 2025, arXiv 2503.14476).
    Raises ``ValueError`` if the shapes differ or the denominator isn't positive.
    """
    if denominator is None:
        denominator = _counts(values, mask).sum().clamp(min=1)
    return _divide(fill_masked(values, mask).sum(), denominator)


def sequence_mean(
    values: Float[Tensor, "*batch t"],
    mask: Bool[Tensor, "*batch t"] | None = None,
    denominator: Denominator | None = None,
) -> Float[Tensor, ""]:
    """Mean of the sequences' own means: every sequence weighs the same, so a token of a long one weighs less.

        L = 1/D · Σ_i 1/|y_i| · Σ_t m_it · x_it,    |y_i| = Σ_t m_it,    D = number of sequences unless given

    Shapes: values and mask [..., T] → scalar. ``denominator``: sequences in the whole batch, for micro-batches.
    A sequence without scored tokens adds 0 and is counted in D. The reduction of GRPO as published (Shao et al. 2024,
    arXiv 2402.03300, eq. 3).
    Raises ``ValueError`` if the shapes differ or the denominator isn't positive.
    """
    counts = _counts(values, mask)
    means = fill_masked(values, mask).sum(-1) / counts.clamp(min=1)
    return _divide(means.sum(), max(counts.numel(), 1) if denominator is None else denominator)


def constant_length_mean(
    values: Float[Tensor, "*batch t"],
    mask: Bool[Tensor, "*batch t"] | None,
    length: int | float,
    denominator: Denominator | None = None,
) -> Float[Tensor, ""]:
    """Sum over tokens divided by a constant length, then mean over sequences: no length changes any weight.

        L = 1/(D·Λ) · Σ_i Σ_t m_it · x_it,    D = number of sequences unless given

    Shapes: values and mask [..., T] → scalar. ``length`` Λ: tokens, usually the generation limit; it only scales.
    ``denominator``: sequences in the whole batch, for micro-batches.
    The reduction of Dr.GRPO (Liu et al. 2025, arXiv 2503.20783).
    Raises ``ValueError`` if the shapes differ or the length or the denominator isn't positive.
    """
    sums = fill_masked(values, mask).sum(-1)
    return _divide(sums.sum() / _positive(length), max(sums.numel(), 1) if denominator is None else denominator)


def _counts(values: Tensor, mask: Tensor | None) -> Tensor:
    """Scored tokens of every sequence, [...]."""
    return values.new_ones(values.shape, dtype=torch.long).sum(-1) if mask is None else mask.sum(-1)


def _divide(total: Tensor, denominator: Denominator) -> Tensor:
    return total / _positive(denominator)


def _positive(number: Denominator) -> Denominator:
    # A tensor isn't looked at: that would make the device wait.
    if not isinstance(number, Tensor) and not number > 0:
        raise ValueError(f"a denominator or length has to be positive, not {number}")
    return number
