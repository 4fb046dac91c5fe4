"""From logits to tokens: which tokens stay, with which probability, and which one a uniform number picks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trueup.rollout.settings import SamplingParams

BLOCK = 128
"""Tokens of the vocabulary whose probabilities are summed before the search goes inside."""

NUCLEUS = 256
"""How many of the most likely tokens are sorted in search of the nucleus, before all are."""


class Sampled(NamedTuple):
    """One token a row: int64 [R], and its log-probs, float32 [R], of the distribution that was sampled and of the
    model's own."""

    tokens: Tensor
    sampler_logprobs: Tensor
    untempered_logprobs: Tensor


def sample(
    logits: Float[Tensor, "r v"],
    uniforms: Float[Tensor, " r"],
    sampling: SamplingParams,
    *,
    seen: Bool[Tensor, "r v"] | None = None,
    out: Float[Tensor, "r v"] | None = None,
) -> Sampled:
    """Pick a token of every row, each with one number in [0, 1).

    ``logits`` are float32 or wider; they are not changed. ``seen``: which tokens the prompt or the completion holds,
    for the repetition penalty. ``out``: room of the logits' kind to work in.
    """
    penalized = seen is not None and sampling.repetition_penalty != 1
    scores = penalize(logits, seen, sampling.repetition_penalty) if penalized else logits
    if sampling.temperature == 0:
        tokens = scores.argmax(-1)
        own = _at(logits, tokens) - logits.logsumexp(-1)
        return Sampled(tokens, torch.zeros_like(own), own)
    own_scores = not penalized and sampling.temperature == 1
    scores = scores if sampling.temperature == 1 else torch.div(scores, sampling.temperature, out=out)
    probabilities = torch.softmax(scores, -1, out=out)  # each row is read before it is written
    kept = restrict(probabilities, sampling)
    tokens, total = pick(kept, uniforms)
    chosen = _at(probabilities, tokens).log()
    own = chosen if own_scores else _at(logits, tokens) - logits.logsumexp(-1)
    return Sampled(tokens, (chosen - total.log()).float(), own.float())


def penalize(logits: Float[Tensor, "r v"], seen: Bool[Tensor, "r v"], penalty: float) -> Float[Tensor, "r v"]:
    """Of tokens that were seen, positive logits divided by the penalty and negative ones multiplied with it.

    Source: Keskar et al. 2019 (arXiv 1909.05858), section 4.1, which divides all; negative ones would gain by that.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def restrict(probabilities: Float[Tensor, "r v"], sampling: SamplingParams) -> Float[Tensor, "r v"]:
    """0 for the tokens that top-k, top-p and min-p cut off, in this order; what is left is not normalised.

    Each is a bound on the probability: of tokens that are equally likely all stay or none. Of the tokens that top-k
    leaves, top-p keeps the most likely ones until they have p of what those have together.
    Source: nucleus, Holtzman et al. 2020 (arXiv 1904.09751); min-p, Nguyen et al. 2024 (arXiv 2407.01082).
    """
    kept = probabilities
    if 0 < sampling.top_k < kept.shape[-1]:
        kept = kept.masked_fill(kept < kept.topk(sampling.top_k, -1).values[:, -1:], 0)
    if sampling.top_p < 1:
        kept = kept.masked_fill(kept < nucleus_bound(kept, sampling.top_p), 0)
    if sampling.min_p > 0:
        kept = kept.masked_fill(kept < sampling.min_p * kept.amax(-1, keepdim=True), 0)
    return kept


def nucleus_bound(probabilities: Float[Tensor, "r v"], top_p: float) -> Float[Tensor, "r 1"]:
    """The probability of the token with which the most likely ones reach ``top_p`` of all: [R, V] → [R, 1]."""
    wanted = top_p * probabilities.sum(-1, keepdim=True, dtype=torch.float64)

    def bound(ordered: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        before = (ordered.cumsum(-1, dtype=torch.float64) < wanted).sum(-1, keepdim=True)
        return ordered.gather(-1, before.clamp_max(ordered.shape[-1] - 1)), before[:, 0] == ordered.shape[-1]

    most_likely = probabilities.topk(min(NUCLEUS, probabilities.shape[-1]), -1).values
    found, open_rows = bound(most_likely, wanted)
    if probabilities.shape[-1] > NUCLEUS and bool(open_rows.any()):
        found[open_rows] = bound(probabilities[open_rows].sort(-1, descending=True).values, wanted[open_rows])[0]
    return found


def pick(weights: Float[Tensor, "r v"], uniforms: Float[Tensor, " r"]) -> tuple[Int[Tensor, " r"], Float[Tensor, " r"]]:
    """The token at which the cumulative weight passes u times the total, and the total (float64).

        token = min { v : Σ_{w ≤ v} weight_w > u · Σ_w weight_w }

    so that P(v) = weight_v / total exactly up to the rounding of sums. Blocks of the vocabulary are summed first
    (float32) and then searched (float64); only one block of each row is looked at token by token. Where rounding has
    moved u · total past the end, it is the last token that has any weight.
    """
    size = weights.shape[-1]
    whole = size - size % BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1)
    block, rest, total = _search(sums, uniforms.double(), relative=True)
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(-1, columns.clamp_max(size - 1))
    if whole < size:
        inside = inside.masked_fill(columns >= size, 0)
    index, _, _ = _search(inside, rest, relative=False)
    return block * BLOCK + index, total


def _search(weights: Tensor, goal: Tensor, *, relative: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where the cumulative weight passes the goal, how far the goal lies behind its beginning, and the total."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    goal = goal * total if relative else goal
    passed = (cumulative <= goal[:, None]).sum(-1)
    last = (cumulative < total[:, None]).sum(-1)  # the last one with any weight
    index = torch.minimum(passed, last)
    begin = torch.where(index > 0, _at(cumulative, (index - 1).clamp_min(0)), 0.0)
    return index, goal - begin, total


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[:, None])[:, 0]
