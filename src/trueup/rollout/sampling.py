"""From logits to tokens: which tokens stay, with which probability, and which one a uniform number picks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trueup.rollout.settings import SamplingParams

BLOCK = 128
"""Tokens of the vocabulary whose weights are summed before the search goes inside."""

NUCLEUS = 256
"""How many of the most likely tokens are sorted in search of the nucleus, before it is searched in all."""

CACHED = {"cpu": 1 << 18}
"""Logits that are worked on at a time, as many as stay in a core's cache; on a GPU all of them."""


class Sampled(NamedTuple):
    """One token a row: int64 [R], and its log-probs, float32 [R], of the distribution that was sampled and of the
    model's own."""

    tokens: Tensor
    sampler_logprobs: Tensor
    untempered_logprobs: Tensor


def as_logits(products: Tensor) -> Tensor:
    """What a model without further ado does behind its head: nothing. A copy in float32 at least."""
    return products.to(torch.promote_types(products.dtype, torch.float32), copy=True)


def sample(
    products: Float[Tensor, "r v"],
    uniforms: Float[Tensor, " r"],
    sampling: SamplingParams,
    *,
    seen: Bool[Tensor, "r v"] | None = None,
    logits_of: Callable[[Tensor], Tensor] = as_logits,
) -> Sampled:
    """Pick a token of every row, each with one number u in [0, 1): the one at which the cumulative weight passes u
    times the total.

        token = min { v : Σ_{w ≤ v} weight_w > u · Σ_w weight_w },    weight_v = exp(score_v − max score), or 0 if cut

    so that P(v) is weight_v over the total, which in float32 need not be 1 of a softmax. Where rounding has moved
    u · total past the end, it is the last token that has any weight. ``products``: what the head gives, in its own
    type. ``logits_of``: what the model makes of them, number by number: a new tensor, float32 or wider. ``seen``: which
    tokens the prompt or the completion holds, for the repetition penalty.

    The rows go by in parts that stay in cache, and leave the sums of ``BLOCK`` weights each. These are searched
    (float64) for all rows together, and the weights of one block of each row are computed once more to search inside.
    """

    def scores_of(logits: Tensor, seen: Tensor | None) -> Tensor:
        """In the room of the logits, unless they are penalized."""
        if seen is not None and penalized:
            logits = penalize(logits, seen, sampling.repetition_penalty)
        return logits if sampling.temperature in (0, 1) else logits.div_(sampling.temperature)

    penalized = seen is not None and sampling.repetition_penalty != 1
    own_scores = not penalized and sampling.temperature == 1
    cuts = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    size = products.shape[-1]
    step = max(1, CACHED.get(products.device.type, products.numel()) // size)
    greedy, tops, bounds, sums, own_totals = [], [], [], [], []
    for start in range(0, len(products), step):
        part = slice(start, start + step)
        logits = logits_of(products[part])
        if not own_scores:
            own_totals.append(log_total(logits))
        scores = scores_of(logits, None if seen is None else seen[part])
        if sampling.temperature == 0:
            greedy.append(scores.argmax(-1))
            continue
        tops.append(scores.amax(-1, keepdim=True))
        weights = scores.sub_(tops[-1]).exp_()
        if cuts:
            if own_scores:
                own_totals.append(weights.sum(-1, dtype=torch.float64).log_() + tops[-1][:, 0])
            bounds.append(least_weight(weights, sampling))
            weights.masked_fill_(weights < bounds[-1], 0)
        sums.append(block_sums(weights))

    if sampling.temperature == 0:
        tokens = torch.cat(greedy)
        own = logits_of(products.gather(-1, tokens[:, None]))[:, 0] - torch.cat(own_totals)
        return Sampled(tokens, torch.zeros_like(own), own)
    block, rest, total = _search(torch.cat(sums), uniforms.double(), relative=True)
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=products.device)
    outside, columns = columns >= size, columns.clamp_max(size - 1)
    logits = logits_of(products.gather(-1, columns))
    own_logits = logits.clone()
    log_weights = scores_of(logits, seen.gather(-1, columns) if seen is not None else None) - torch.cat(tops)
    weights = log_weights.exp().masked_fill_(outside, 0)
    if cuts:
        weights.masked_fill_(weights < torch.cat(bounds), 0)
    index, _, _ = _search(weights, rest, relative=False)
    sampler_logprobs = (_at(log_weights, index) - total.log()).float()
    own = (_at(own_logits, index) - torch.cat(own_totals)).float() if own_totals else sampler_logprobs
    return Sampled(block * BLOCK + index, sampler_logprobs, own)


def penalize(logits: Float[Tensor, "r v"], seen: Bool[Tensor, "r v"], penalty: float) -> Float[Tensor, "r v"]:
    """Of tokens that were seen, positive logits divided by the penalty and negative ones multiplied with it.

    Source: Keskar et al. 2019 (arXiv 1909.05858), section 4.1, which divides all: a negative one would gain by that.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def least_weight(weights: Float[Tensor, "r v"], sampling: SamplingParams) -> Float[Tensor, "r 1"]:
    """The weight that a token needs so that top-k, top-p and min-p, in this order, leave it: [R, V] → [R, 1].

    Of tokens that are equally likely all stay or none. Of the tokens that top-k leaves, top-p keeps the most likely
    ones until they have p of what those have together. ``weights``: probabilities, up to a factor of each row.
    Source: nucleus, Holtzman et al. 2020 (arXiv 1904.09751); min-p, Nguyen et al. 2024 (arXiv 2407.01082).
    """
    bound = weights.new_zeros(len(weights), 1)
    if 0 < sampling.top_k < weights.shape[-1]:
        bound = weights.topk(sampling.top_k, -1).values[:, -1:]
    if sampling.top_p < 1:
        left = weights.masked_fill(weights < bound, 0) if sampling.top_k else weights
        bound = torch.maximum(bound, nucleus_bound(left, sampling.top_p))
    if sampling.min_p > 0:
        bound = torch.maximum(bound, sampling.min_p * weights.amax(-1, keepdim=True))
    return bound


def nucleus_bound(weights: Float[Tensor, "r v"], top_p: float) -> Float[Tensor, "r 1"]:
    """The weight of the token with which the most likely ones reach ``top_p`` of all: [R, V] → [R, 1]."""
    wanted = top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)
    ordered = weights.topk(min(NUCLEUS, weights.shape[-1]), -1).values
    before = (ordered.cumsum(-1, dtype=torch.float64) < wanted).sum(-1, keepdim=True)
    bound = ordered.gather(-1, before.clamp_max(ordered.shape[-1] - 1))
    open_rows = before[:, 0] == ordered.shape[-1]
    if bool(open_rows.any()):
        bound[open_rows] = _bisected(weights[open_rows], wanted[open_rows])
    return bound


def _bisected(weights: Tensor, wanted: Tensor) -> Tensor:
    """The largest t for which the weights ≥ t have together what is wanted: [R, V], [R, 1] → [R, 1].

    It is one of the weights. Numbers ≥ 0 are ordered as their bits are, so that each look decides one bit. It takes
    about as long as sorting all of them, and no more memory than the weights do.
    """
    integers = torch.int32 if weights.dtype == torch.float32 else torch.int64
    bits = torch.zeros(len(weights), 1, dtype=integers, device=weights.device)
    for bit in reversed(range(8 * weights.itemsize - 1)):
        trial = bits | 1 << bit
        bound = trial.view(weights.dtype)
        enough = torch.where(weights >= bound, weights, 0).sum(-1, keepdim=True, dtype=torch.float64) >= wanted
        bits = torch.where(enough, trial, bits)
    return bits.view(weights.dtype)


def log_total(logits: Float[Tensor, "r v"]) -> Float[Tensor, " r"]:
    """log Σ_v exp(logit_v), as ``logsumexp``, which takes twice as long."""
    top = logits.amax(-1, keepdim=True)
    return (logits - top).exp_().sum(-1).log_() + top[:, 0]


def block_sums(weights: Float[Tensor, "r v"]) -> Float[Tensor, "r blocks"]:
    """Sums of ``BLOCK`` neighbours each, the last one of what is left: [R, V] → [R, ⌈V / BLOCK⌉]."""
    whole = weights.shape[-1] - weights.shape[-1] % BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    if whole == weights.shape[-1]:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1)


def _search(weights: Tensor, goal: Tensor, *, relative: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where the cumulative weight passes the goal, how far the goal lies behind its beginning, and the total."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    goal = goal[:, None] * total if relative else goal[:, None]
    passed = torch.searchsorted(cumulative, goal, right=True)
    last = torch.searchsorted(cumulative, total)  # the last one with any weight
    index = torch.minimum(passed, last)
    begin = cumulative.gather(-1, (index - 1).clamp_min(0)).masked_fill_(index == 0, 0)
    return index[:, 0], (goal - begin)[:, 0], total[:, 0]


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[:, None])[:, 0]
