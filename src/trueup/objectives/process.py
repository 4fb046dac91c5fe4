"""Judging an answer step by step: the loss of a process reward model, and one score from the scores of its steps.

A process reward model gives every step a score s_t in logits: σ(s_t) is the probability that step t is right, given the
prompt and the steps up to it. Shapes are ``[*batch, S]`` with one entry per step; ``mask`` is False where a row has no
step, or one that nobody labelled. What stands there, NaN included, takes no part.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from trueup.objectives.shapes import fill_masked, require_same_shape


def process_reward_loss(
    scores: Float[Tensor, "*batch s"],
    labels: Float[Tensor, "*batch s"],
    mask: Bool[Tensor, "*batch s"] | None = None,
) -> Float[Tensor, "*batch s"]:
    """Binary cross-entropy of every step's label under its score; 0 where masked.

        L_t = −z_t·log σ(s_t) − (1 − z_t)·log(1 − σ(s_t))

    ``labels`` z_t: 1 for a right step, 0 for a wrong one, or anything between: a soft label is the share of right among
    several judgements of the step (of several people, or of several ways to finish from it). In nats. The population
    minimiser is σ(s_t) = E[z_t | prompt, steps up to t]. Labels must lie in [0, 1]; a look at them would stop a device.
    Raises ``ValueError`` for shapes that differ.
    Source: Lightman et al. 2023 (arXiv 2305.20050) and Uesato et al. 2022 (arXiv 2211.14275): a label per step; Wang et
    al. 2023 (Math-Shepherd, arXiv 2312.08935): labels estimated by finishing the solution several times.
    """
    require_same_shape(scores, labels=labels)
    scores = fill_masked(scores, mask)
    return fill_masked(-(labels * logsigmoid(scores) + (1 - labels) * logsigmoid(-scores)), mask)


def last_step_score(
    scores: Float[Tensor, "*batch s"], mask: Bool[Tensor, "*batch s"] | None = None
) -> Float[Tensor, "*batch"]:
    """The score of a row's last step: how a model that judges whole answers would be read.

        s = s_T

    In the units of ``scores``. NaN for a row without steps. Raises ``ValueError`` for shapes that differ.
    """
    steps = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    number = steps.cumsum(-1)
    is_last = steps & (number == number[..., -1:])
    # A row without steps has no last one, and a sum over nothing is 0: that would be a score.
    return torch.where(is_last.any(-1), fill_masked(scores, is_last).sum(-1), torch.nan)


def min_step_score(
    scores: Float[Tensor, "*batch s"], mask: Bool[Tensor, "*batch s"] | None = None
) -> Float[Tensor, "*batch"]:
    """The lowest score of a row: an answer is as good as its worst step.

        s = min_t s_t

    In the units of ``scores``; logits and probabilities agree on the step. +∞ for a row without steps. Raises
    ``ValueError`` for shapes that differ. Source: Lightman et al. 2023 (arXiv 2305.20050), the strategy "minimum".
    """
    return fill_masked(scores, mask, torch.inf).amin(-1)


def mean_step_score(
    scores: Float[Tensor, "*batch s"], mask: Bool[Tensor, "*batch s"] | None = None
) -> Float[Tensor, "*batch"]:
    """The mean score of a row's steps.

        s = 1/T · Σ_t s_t

    In the units of ``scores``: of logits it is a mean of log-odds; give it σ(scores) for a mean of probabilities. NaN
    for a row without steps. Raises ``ValueError`` for shapes that differ.
    """
    sums = fill_masked(scores, mask).sum(-1)
    return sums / fill_masked(torch.ones_like(scores), mask).sum(-1)


def product_step_score(
    scores: Float[Tensor, "*batch s"], mask: Bool[Tensor, "*batch s"] | None = None
) -> Float[Tensor, "*batch"]:
    """Log-probability that every step of a row is right.

        s = Σ_t log σ(s_t)

    ``scores`` are logits; the result is in nats, at most 0, and 0 for a row without steps. More steps make it smaller.
    Raises ``ValueError`` for shapes that differ.
    Source: Lightman et al. 2023 (arXiv 2305.20050): the score of a solution is the product of its steps' probabilities.
    """
    return fill_masked(logsigmoid(fill_masked(scores, mask)), mask).sum(-1)


AGGREGATIONS = {
    "last": last_step_score,
    "min": min_step_score,
    "mean": mean_step_score,
    "product": product_step_score,
}
"""From the scores of an answer's steps to one score of the answer, by name."""
