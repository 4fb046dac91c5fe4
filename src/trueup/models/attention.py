"""Attention over the tree batch, and the seam through which transformers' models reach it.

The ``TreeLayout`` travels through the model's forward pass as the keyword argument ``layout`` and ends at the function
registered here with transformers' ``AttentionInterface``. A layout of another kind (``trueup.rollout.cohort``) brings
its own ``attend``. Three kernels compute the tree's attention:

- ``dense_attention`` under ``TreeLayout.visible``: a dozen plain lines, the truth of the tests, and the kernel for what
  the others can't (soft-capped scores, sinks, dropout);
- ``attention_by_parts`` on the CPU: no padding, no copy of a key, no [T, T] mask;
- ``flex_tree_attention`` on CUDA.

Shapes: query [1, H, T, D], key and value [1, H_kv, T, D] → [1, H, T, D]; H is a multiple of H_kv. The first two take a
stream that goes on behind the layout's end, with padding: nothing looks at it, and its own attention is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trueup.models.tree import GroupSpan, TreeLayout
from trueup.objectives.products import cpu_multiplies

TREE_ATTENTION = "trueup_tree"
"""The name of the attention implementation: ``model.config._attn_implementation``."""

CALL_COST = 6000
"""What one more call of the CPU's kernel costs, in query-key pairs (measured with 6 heads of 48)."""


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention under any boolean mask (broadcast to [B, H, Q, K]; True: visible), written out.

        softmax_k( cap·tanh(scaling·q·k / cap) ) · v

    ``sinks`` [H] are scores of a further key whose value is 0 (gpt-oss). Scores and softmax in float32 at least.
    """
    copies = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # The lowest number and not −∞: a padding token that sees nothing must not become NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


def dense_tree_attention(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, **options: Any) -> Tensor:
    """``dense_attention`` group by group: [T, T] never exists. Options are its keywords and ``window``."""
    window = options.pop("window", None)
    places = [slice(span.start, span.stop) for span in layout.spans]
    padding = query.shape[2] - places[-1].stop
    real = (each[:, :, : places[-1].stop] for each in (query, key, value))
    sizes = [place.stop - place.start for place in places]
    blocks = zip(places, *(each.split(sizes, 2) for each in real), strict=True)
    outs = [dense_attention(q, k, v, layout.mask(window, place, place), **options) for place, q, k, v in blocks]
    return nn.functional.pad(torch.cat(outs, dim=2), (0, 0, 0, padding))


class Part(NamedTuple):
    """A block of queries that attends to a block of keys, both contiguous in the stream."""

    queries: slice
    keys: slice
    causal: bool = False
    bias: Tensor | None = None
    """Added to the scores [Q, K]: 0 where visible, −∞ elsewhere. None: all visible, or as ``causal`` says."""


def attention_parts(layout: TreeLayout, window: int | None, dtype: torch.dtype) -> list[Part]:
    """The stream's attention as blocks that together hold every visible pair once, and what else they hold is hidden.

    A block whose keys end before its queries begin (a prompt under its completions) comes after the one in which these
    queries attend to their own stretch. ``dtype`` is that of the biases. Kept with the layout, as every layer asks.
    """
    if (window, dtype) not in layout.kept:
        parts: list[Part] = []
        for run in _runs(layout.spans):
            whole = slice(run[0].start, run[-1].stop)
            parts += (
                _parts(layout, run[0], window, dtype)
                if len(run) == 1
                else [_biased(layout, whole, whole, window, dtype)]
            )
        layout.kept[window, dtype] = parts
    return layout.kept[window, dtype]


def _runs(spans: Sequence[GroupSpan]) -> list[list[GroupSpan]]:
    """Neighbouring groups that are so small that one call for all of them, what lies between them computed and thrown
    away, costs less than a call for each."""
    runs: list[list[GroupSpan]] = []
    for span in spans:
        if runs and (span.stop - runs[-1][0].start) ** 2 <= CALL_COST:
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs


def _biased(layout: TreeLayout, queries: slice, keys: slice, window: int | None, dtype: torch.dtype) -> Part:
    seen = layout.mask(window, queries, keys)
    return Part(queries, keys, bias=torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf")))


def _parts(layout: TreeLayout, span: GroupSpan, window: int | None, dtype: torch.dtype) -> Iterator[Part]:
    def causal(place: slice) -> Iterator[Part]:
        """A stretch of consecutive positions that attends to itself."""
        if window is None or place.stop - place.start <= window:
            yield Part(place, place, causal=True)
            return
        step = max(window, 64)
        for start in range(place.start, place.stop, step):
            stop = min(start + step, place.stop)
            yield biased(slice(start, stop), slice(max(place.start, start - window + 1), stop))

    def biased(queries: slice, keys: slice) -> Part:
        return _biased(layout, queries, keys, window, dtype)

    if len(span.completions) == 1:
        yield from causal(slice(span.start, span.stop))
        return
    yield from causal(slice(span.start, span.split))
    completions = slice(span.split, span.stop)
    # A completion's first token stands at position P and reaches back to P − window + 1, and no further.
    reach = span.prompt if window is None else min(span.prompt, window - 1)
    num_crossing = sum(span.completions) ** 2 - sum(n * n for n in span.completions)
    if num_crossing <= CALL_COST * len(span.completions):
        # Few and short: one call, which also computes what lies between siblings and throws it away.
        yield biased(completions, slice(span.split - reach, span.stop))
        return
    for branch in span.branches:
        yield from causal(branch)
    prompt = slice(span.split - reach, span.split)
    if window is None or span.prompt + max(span.completions) <= window:
        yield Part(completions, prompt)
    elif reach:
        for branch in span.branches:
            yield biased(slice(branch.start, min(branch.stop, branch.start + window - 1)), prompt)


class _AttentionByParts(torch.autograd.Function):
    """Attention of blocks merged through their log-sum-exp, without a copy of any key.

    A query whose keys lie in several parts gets Σ_p exp(lse_p − lse)·out_p with lse = log Σ_p exp(lse_p). The gradient
    of a part is that of any attention, given the *merged* output and log-sum-exp: they are what normalises its weights.
    Source: parts merged through log-sum-exps, forward and backward, as in ring attention, Liu et al. 2023
    (arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, window: int | None, scaling: float
    ):
        # [1, T, H, D] in memory, as the model wants it back
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        out[:, :, layout.spans[-1].stop :] = 0
        dtype = torch.promote_types(query.dtype, torch.float32)
        lse = out.new_empty(1, query.shape[2], query.shape[1], dtype=dtype).transpose(1, 2)
        for part in attention_parts(layout, window, query.dtype):
            piece, piece_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, part.queries],
                key[:, :, part.keys],
                value[:, :, part.keys],
                0.0,
                part.causal,
                attn_mask=part.bias,
                scale=scaling,
            )
            here, here_lse = out[:, :, part.queries], lse[:, :, part.queries]
            if part.keys.stop <= part.queries.start:  # what comes on top of the queries' own stretch
                total = torch.logaddexp(here_lse, piece_lse)
                here.mul_((here_lse - total).exp_().unsqueeze(-1))
                here.add_(piece.mul_((piece_lse - total).exp_().unsqueeze(-1)))
                here_lse.copy_(total)
            else:
                here.copy_(piece)
                here_lse.copy_(piece_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.window, ctx.scaling = layout, window, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        *saved, lse = ctx.saved_tensors
        # PyTorch's kernel is many times slower in half precision.
        query, key, value, out, grad = (each.to(lse.dtype) for each in (*saved, grad))
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for part in attention_parts(ctx.layout, ctx.window, lse.dtype):
            pieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, part.queries],
                query[:, :, part.queries],
                key[:, :, part.keys],
                value[:, :, part.keys],
                out[:, :, part.queries],
                lse[:, :, part.queries],
                0.0,
                part.causal,
                attn_mask=part.bias,
                scale=ctx.scaling,
            )
            for total, piece, where in zip(grads, pieces, (part.queries, part.keys, part.keys), strict=True):
                total[:, :, where].add_(piece)
        return *(total.to(saved[0].dtype) for total in grads), None, None, None


def attention_by_parts(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, scaling: float, window: int | None = None
) -> Tensor:
    """The CPU's kernel: in bfloat16 where the CPU multiplies it, else in float32 at least."""
    native = query.dtype == torch.bfloat16 and cpu_multiplies(torch.bfloat16)
    dtype = query.dtype if native else torch.promote_types(query.dtype, torch.float32)
    out = _AttentionByParts.apply(query.to(dtype), key.to(dtype), value.to(dtype), layout, window, scaling)
    return out.to(query.dtype)  # pyright: ignore[reportOptionalMemberAccess]


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """CUDA's kernel: FlexAttention over ``visible``; its block mask is kept with the layout, one per window."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = query.shape[2]
    if window not in layout.kept:
        layout.kept[window] = create_block_mask(
            lambda batch, head, q, k: layout.visible(q, k, window), None, None, length, length, device=query.device.type
        )

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    return _compiled_flex_attention()(
        query, key, value, score_mod=capped, block_mask=layout.kept[window], scale=scaling, enable_gqa=True
    )


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over the stream with the fastest kernel that can do it: [1, H, T, D] → [1, H, T, D_value].

    Raises ``ValueError`` if the tensors are not one stream of the layout's length or more.
    """
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] >= len(layout.group):
        raise ValueError(f"{len(layout.group)} tokens in the layout, but queries {query.shape} and keys {key.shape}")
    plain = sinks is None and dropout == 0.0 and query.shape[-1] == value.shape[-1]
    if plain and query.device.type == "cuda":
        return flex_tree_attention(query, key, value, layout, scaling=scaling, window=window, softcap=softcap)
    if plain and query.device.type == "cpu" and softcap is None:
        return attention_by_parts(query, key, value, layout, scaling=scaling, window=window)
    return dense_tree_attention(
        query, key, value, layout, scaling=scaling, window=window, softcap=softcap, sinks=sinks, dropout=dropout
    )


# --- the seam with transformers


class Layout(Protocol):
    """What a forward pass can carry in place of a ``TreeLayout``: it is asked in every attention layer, in order."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        dropout: float,
    ) -> Tensor: ...


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: TreeLayout | Layout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer.

    Without a layout (``generate``, a plain forward pass) it is transformers' ``sdpa``, soft-cap and sinks added.
    """
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    if layout is not None:
        if kwargs.get("position_bias") is not None:
            raise ValueError("a position bias added to the scores is not part of the tree batch")
        # Rotary embeddings come in the residual stream's type, which may have more bits than products are to have.
        query, key = query.to(value.dtype), key.to(value.dtype)
        attend = partial(tree_attention, layout=layout) if isinstance(layout, TreeLayout) else layout.attend
        out = attend(
            query,
            key,
            value,
            scaling=scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
            dropout=dropout,
        )
    elif softcap is not None or s_aux is not None:
        num_queries, num_keys = query.shape[2], key.shape[2]
        causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        seen = causal if attention_mask is None else attention_mask
        out = dense_attention(query, key, value, seen, scaling=scaling, softcap=softcap, sinks=s_aux, dropout=dropout)
    else:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return out.transpose(1, 2).contiguous(), None


def register_tree_attention() -> str:
    """Make ``TREE_ATTENTION`` known to transformers, and return it. May be called again."""
    AttentionInterface.register(TREE_ATTENTION, attention_forward)
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
    return TREE_ATTENTION


def no_mask(device: torch.device) -> Tensor:
    """The ``attention_mask`` to pass beside a layout; the tree's attention does not read it.

    transformers hands a 4-dimensional mask on as it is, so that it builds no [T, T] mask of its own.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
