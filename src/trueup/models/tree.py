"""The tree batch: every prompt once, its K completions behind it, in one flat stream without padding.

A batch of groups is the stream ``prompt 1, its completions, prompt 2, its completions, …`` of T tokens. Linear layers and
norms work on it token by token, so only attention has to know the shape. It is told by a ``TreeLayout`` that travels through
the model's forward pass as the keyword argument ``layout`` and ends at the function registered here with transformers'
``AttentionInterface``. Three kernels compute the same thing:

- ``dense_attention`` under ``TreeLayout.visible``: a dozen plain lines, the truth of the tests, and the kernel for what the
  others can't (soft-capped scores, sinks, dropout);
- ``attention_by_parts`` on the CPU: prompts attend to themselves, all completions of a group attend to its prompt as one
  block of queries, every completion attends to itself; parts are merged through their log-sum-exp;
- ``flex_tree_attention`` on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trueup.errors import DataError
from trueup.records import CompletionGroup

TREE_ATTENTION = "trueup_tree"
"""The name of the attention implementation: ``model.config._attn_implementation``."""

HIDDEN = -1e30
"""Added to scores that a window hides: finite, so that a part of which a query sees nothing has weight 0 and not NaN."""


class GroupSpan(NamedTuple):
    """Where one group lies in the stream: its first token, the prompt's length, the completions' lengths."""

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def split(self) -> int:
        """The first token behind the prompt."""
        return self.start + self.prompt

    @property
    def stop(self) -> int:
        return self.split + sum(self.completions)

    @property
    def branches(self) -> tuple[slice, ...]:
        """Each completion's place in the stream."""
        stops = np.cumsum((self.split, *self.completions)).tolist()
        return tuple(slice(start, stop) for start, stop in zip(stops, stops[1:], strict=False))


class Part(NamedTuple):
    """A block of queries that attends to a block of keys, both contiguous in the stream."""

    queries: slice
    keys: slice
    causal: bool
    bias: Tensor | None
    """Added to the scores [Q, K] where a window hides some of them; takes causality's place then."""


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """What attention needs to know about a stream of T tokens.

    ``group``, ``branch`` and ``positions``: int64 [T]; branch 0 is the prompt, 1 … K are its completions. ``spans``: the
    same as plain numbers, one per group.
    """

    group: Tensor
    branch: Tensor
    positions: Tensor
    spans: tuple[GroupSpan, ...]
    _by_window: dict[Any, Any] = field(default_factory=dict, repr=False)

    def visible(self, queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
        """The predicate that every kernel is held against: may stream index q look at stream index k?

            visible(q, k) = same group ∧ (k in the prompt ∨ same completion) ∧ 0 ≤ pos_q − pos_k < window

        ``queries`` and ``keys``: int64, of shapes that broadcast; the result is bool of the common shape. ``window`` counts
        tokens, the query's own included; None sees all.
        """
        distance = self.positions[queries] - self.positions[keys]
        same_path = (self.branch[keys] == 0) | (self.branch[queries] == self.branch[keys])
        seen = (self.group[queries] == self.group[keys]) & same_path & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    def mask(self, window: int | None = None, span: slice = slice(None)) -> Tensor:
        """``visible`` for all pairs of a stretch of the stream: bool [Q, K]."""
        index = torch.arange(len(self.group), device=self.group.device)[span]
        return self.visible(index[:, None], index[None, :], window)

    def parts(self, window: int | None, dtype: torch.dtype) -> list[Part]:
        """The stream's attention as blocks that together hold every visible pair once. Kept, as all layers ask for it."""
        if (window, dtype) not in self._by_window:
            self._by_window[window, dtype] = [part for span in self.spans for part in self._parts(span, window, dtype)]
        return self._by_window[window, dtype]

    def _parts(self, span: GroupSpan, window: int | None, dtype: torch.dtype) -> list[Part]:
        prompt, completions = slice(span.start, span.split), slice(span.split, span.stop)
        # A completion's first token stands at position P and reaches back to P − window + 1: earlier keys are out of sight.
        reach = span.prompt if window is None else min(span.prompt, window - 1)
        in_reach = slice(span.split - reach, span.split)
        parts = [self._part(prompt, prompt, True, span.prompt, window, dtype)]
        if reach and span.completions:
            farthest = reach + max(span.completions)
            parts.append(self._part(completions, in_reach, False, farthest, window, dtype))
        parts += [
            self._part(branch, branch, True, branch.stop - branch.start, window, dtype) for branch in span.branches
        ]
        return parts

    def _part(
        self, queries: slice, keys: slice, causal: bool, extent: int, window: int | None, dtype: torch.dtype
    ) -> Part:
        """``extent``: one more than the largest distance inside; only beyond the window is a bias needed."""
        if window is None or extent <= window:
            return Part(queries, keys, causal, None)
        index = torch.arange(len(self.group), device=self.group.device)
        seen = self.visible(index[queries][:, None], index[keys][None, :], window)
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, HIDDEN)
        return Part(queries, keys, False, bias)


class PaddedRows(NamedTuple):
    """The same batch as one right-padded row per completion, its prompt repeated: [C, L].

    ``scored`` [S] and ``last`` [C] index the flattened rows and mean what they mean in the ``TreeBatch``.
    """

    tokens: Tensor
    attention_mask: Tensor
    scored: Tensor
    last: Tensor


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """N groups with C completions in all, as one stream of T tokens, S of them to be scored.

    ``tokens``, ``positions``: int64 [T]; a completion's positions start at its prompt's length.
    ``scored``: int64 [S], the stream index of the hidden state that predicts each completion token: the prompt's last token
    scores the first token of all its completions. ``targets``: int64 [S], those tokens. ``mask``: bool [S], True where the
    model wrote the token. ``lengths``, ``last``, ``group_of``: int64 [C], a completion's number of tokens, the stream index
    of its last token, and its group's number. Completions stand in the order of the groups.
    """

    tokens: Tensor
    positions: Tensor
    layout: TreeLayout
    scored: Tensor
    targets: Tensor
    mask: Tensor
    lengths: Tensor
    last: Tensor
    group_of: Tensor
    num_groups: int

    def rows(self, flat: Tensor) -> Tensor:
        """One row per completion: [S, …] → [C, Tmax, …], zeros behind each completion's end.

        Differentiable, and its gradient is the same to the bit in every run: each value has one place.
        """
        length = int(self.lengths.max())
        starts = torch.arange(len(self.lengths), device=flat.device) * length
        first = self.lengths.cumsum(0) - self.lengths
        place = torch.arange(len(flat), device=flat.device) + (starts - first).repeat_interleave(self.lengths)
        rows = flat.new_zeros(len(self.lengths) * length, *flat.shape[1:]).index_copy(0, place, flat)
        return rows.view(len(self.lengths), length, *flat.shape[1:])

    @property
    def row_mask(self) -> Tensor:
        """``mask`` as rows: bool [C, Tmax], False behind each completion's end."""
        return self.rows(self.mask)

    def padded(self) -> PaddedRows:
        """The batch for a model that can't read the tree: each completion a row of its own behind its prompt."""
        paths = [np.r_[span.start : span.split, branch] for span in self.layout.spans for branch in span.branches]
        width = max(len(path) for path in paths)
        index = np.zeros((len(paths), width), dtype=np.int64)
        real = np.zeros((len(paths), width), dtype=np.int64)
        for row, path in enumerate(paths):
            index[row, : len(path)], real[row, : len(path)] = path, 1
        last = np.arange(len(paths)) * width + [len(path) - 1 for path in paths]
        lengths = self.lengths.cpu().numpy()
        scored = np.concatenate([np.arange(end - n, end) for end, n in zip(last, lengths, strict=True)])
        device = self.tokens.device
        attention_mask = torch.from_numpy(real).to(device)
        # Padding is never looked at, so any token serves; 0 exists in every vocabulary.
        tokens = self.tokens[torch.from_numpy(index).to(device)] * attention_mask
        return PaddedRows(
            tokens, attention_mask, torch.from_numpy(scored).to(device), torch.from_numpy(last).to(device)
        )


def tree_batch(groups: Sequence[CompletionGroup], device: torch.device | str = "cpu") -> TreeBatch:
    """Lay groups out as one stream.

    Raises ``ValueError`` for no groups, ``DataError`` for an empty prompt, a group without completions, or an empty completion:
    there would be no hidden state to score from, or nothing to score.
    """
    if not groups:
        raise ValueError("a batch needs at least one group")
    tokens, spans, scored, masks = [], [], [], []
    start = 0
    for group in groups:
        lengths = tuple(len(completion.tokens) for completion in group.completions)
        if len(group.prompt) == 0 or not lengths or 0 in lengths:
            raise DataError("an empty prompt, no completion, or an empty completion", where=group.where or None)
        span = GroupSpan(start, len(group.prompt), lengths)
        tokens += [group.prompt, *(completion.tokens for completion in group.completions)]
        masks += [completion.completion_mask for completion in group.completions]
        scored += [np.r_[span.split - 1, branch.start : branch.stop - 1] for branch in span.branches]
        spans.append(span)
        start = span.stop

    segments = [
        (n, span.prompt if b else 0, b) for span in spans for b, n in enumerate((span.prompt, *span.completions))
    ]
    positions = np.concatenate([np.arange(offset, offset + n) for n, offset, _ in segments])
    branch = np.repeat([b for *_, b in segments], [n for n, *_ in segments])
    group_index = np.repeat(np.arange(len(spans)), [span.stop - span.start for span in spans])
    lengths = np.array([n for span in spans for n in span.completions])
    last = np.array([completion.stop - 1 for span in spans for completion in span.branches])
    group_of = np.repeat(np.arange(len(spans)), [len(span.completions) for span in spans])

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    stream = put(np.concatenate(tokens).astype(np.int64))
    scored_index = np.concatenate(scored)
    is_target = np.concatenate([np.arange(branch.start, branch.stop) for span in spans for branch in span.branches])
    layout = TreeLayout(put(group_index), put(branch), put(positions), tuple(spans))
    return TreeBatch(
        tokens=stream,
        positions=layout.positions,
        layout=layout,
        scored=put(scored_index),
        targets=stream[put(is_target)],
        mask=put(np.concatenate(masks).astype(bool)),
        lengths=put(lengths),
        last=put(last),
        group_of=put(group_of),
        num_groups=len(spans),
    )


# --- kernels: query [1, H, T, D], key and value [1, H_kv, T, D] → [1, H, T, D]


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
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


def dense_tree_attention(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, **options: Any) -> Tensor:
    """``dense_attention`` group by group: [T, T] never exists. Options are its keywords and ``window``."""
    window = options.pop("window", None)
    sizes = [span.stop - span.start for span in layout.spans]
    blocks = zip(layout.spans, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    return torch.cat(
        [
            dense_attention(q, k, v, layout.mask(window, slice(span.start, span.stop)), **options)
            for span, q, k, v in blocks
        ],
        dim=2,
    )


class _AttentionByParts(torch.autograd.Function):
    """Attention of blocks merged through their log-sum-exp, without a copy of any key.

    A query whose keys lie in several parts gets Σ_p exp(lse_p − lse)·out_p with lse = log Σ_p exp(lse_p). The gradient of a
    part is flash attention's own, given the *merged* output and log-sum-exp, as they are what normalises its weights.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, window: int | None, scaling: float
    ):
        # [1, T, H, …] in memory, as the model wants it back
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        lse = query.new_empty(1, query.shape[2], query.shape[1]).transpose(1, 2)
        written = 0
        ctx.parts, ctx.scaling = layout.parts(window, query.dtype), scaling
        for part in ctx.parts:
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
            if part.queries.start < written:
                total = torch.logaddexp(here_lse, piece_lse)
                here.mul_((here_lse - total).exp_().unsqueeze(-1))
                here.add_(piece.mul_((piece_lse - total).exp_().unsqueeze(-1)))
                here_lse.copy_(total)
            else:
                here.copy_(piece)
                here_lse.copy_(piece_lse)
                written = part.queries.stop
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse = ctx.saved_tensors
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for part in ctx.parts:
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
                total[:, :, where] += piece
        return *grads, None, None, None


def attention_by_parts(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, scaling: float, window: int | None = None
) -> Tensor:
    """The CPU's kernel. Half precision is computed in float32: the CPU's half-precision backward is ten times slower."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out = _AttentionByParts.apply(query.to(wide), key.to(wide), value.to(wide), layout, window, scaling)
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
    if window not in layout._by_window:
        layout._by_window[window] = create_block_mask(
            lambda batch, head, q, k: layout.visible(q, k, window), None, None, length, length, device=query.device.type
        )

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    return _compiled_flex_attention()(
        query, key, value, score_mod=capped, block_mask=layout._by_window[window], scale=scaling, enable_gqa=True
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

    Raises ``ValueError`` if the tensors are not one stream of the layout's length.
    """
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == len(layout.group):
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


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: TreeLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer. Without a layout (``generate``, plain forward) it is its ``sdpa``,
    soft-cap and sinks added."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is not None:
        if kwargs.get("position_bias") is not None:
            raise ValueError("a position bias added to the scores is not part of the tree batch")
        out = tree_attention(
            query,
            key,
            value,
            layout,
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
    AttentionInterface.register(TREE_ATTENTION, _attention_forward)
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
    return TREE_ATTENTION


def no_mask(device: torch.device) -> Tensor:
    """The ``attention_mask`` to pass beside a layout: transformers hands a 4-dimensional mask on as it is, and so builds none
    of its own [T, T] masks; the tree's attention does not read it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
