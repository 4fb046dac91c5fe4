"""The tree batch: every prompt once, its K completions behind it, in one flat stream without padding.

A batch of groups is the stream ``prompt 1, its completions, prompt 2, its completions, …`` of T tokens. Linear layers
and norms work on it token by token. Only attention has to know the shape: it is told by a ``TreeLayout``, whose
predicate ``visible`` says which token may look at which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trueup.errors import DataError
from trueup.records import CompletionGroup


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
        return tuple(slice(start, stop) for start, stop in pairwise(stops))


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """What attention needs to know about a stream of T tokens.

    ``group``, ``branch`` and ``positions``: int64 [T]; branch 0 is the prompt, 1 … K are its completions. ``spans``:
    the same as plain numbers, one per group.
    """

    group: Tensor
    branch: Tensor
    positions: Tensor
    spans: tuple[GroupSpan, ...]
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What a kernel works out from the layout once for all layers."""

    def visible(self, queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
        """The predicate that every kernel is held against: may stream index q look at stream index k?

            visible(q, k) = same group ∧ (k in the prompt ∨ same completion) ∧ 0 ≤ pos_q − pos_k < window

        ``queries`` and ``keys``: int64, of shapes that broadcast; the result is bool of the common shape. ``window``
        counts tokens, the query's own included; None sees all.
        """
        distance = self.positions[queries] - self.positions[keys]
        same_path = (self.branch[keys] == 0) | (self.branch[queries] == self.branch[keys])
        seen = (self.group[queries] == self.group[keys]) & same_path & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    def mask(self, window: int | None = None, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """``visible`` for all pairs of two stretches of the stream: bool [Q, K]."""
        index = torch.arange(len(self.group), device=self.group.device)
        return self.visible(index[queries][:, None], index[keys][None, :], window)


class PaddedRows(NamedTuple):
    """The same batch as one right-padded row per completion, its prompt repeated: [C, L].

    ``stream`` [C, L]: the stream index of each token. ``scored`` [S], ``last`` [C] and ``step_ends`` [M] index the
    flattened rows and mean what they mean in the ``TreeBatch``.
    """

    tokens: Tensor
    attention_mask: Tensor
    stream: Tensor
    scored: Tensor
    last: Tensor
    step_ends: Tensor

    @property
    def states(self) -> Tensor:
        """int64 [S + C]: every state that a critic values, the one before each scored token, then each last one."""
        return torch.cat([self.scored, self.last])


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """N groups with C completions in all, as one stream of T tokens; the S that the model wrote are to be scored.

    ``tokens``, ``positions``: int64 [T]; a completion's positions start at its prompt's length.
    ``scored``: int64 [S], the stream index of the hidden state that predicts each scored token: the prompt's last token
    scores the first token of all its completions. ``targets``: int64 [S], those tokens. ``places``: int64 [S], where
    each stands in ``rows``. ``lengths``, ``last``, ``group_of``: int64 [C], a completion's number of tokens, the stream
    index of its last token, and its group's number. ``step_ends``: int64 [M], the stream index of the last token of
    each step of the completions that are divided into steps. Completions stand in the order of the groups.
    """

    tokens: Tensor
    positions: Tensor
    layout: TreeLayout
    scored: Tensor
    targets: Tensor
    places: Tensor
    lengths: Tensor
    last: Tensor
    step_ends: Tensor
    group_of: Tensor
    num_groups: int

    @property
    def longest(self) -> int:
        """Tmax: tokens in the longest completion."""
        return max(max(span.completions) for span in self.layout.spans)

    def rows(self, flat: Tensor) -> Tensor:
        """One row per completion, one column per token: [S, …] → [C, Tmax, …], zeros where nothing is scored.

        Differentiable, and its gradient is the same to the bit in every run: each value has one place.
        """
        shape = (len(self.lengths), self.longest, *flat.shape[1:])
        return flat.new_zeros(shape[0] * shape[1], *shape[2:]).index_copy(0, self.places, flat).view(shape)

    @property
    def row_mask(self) -> Tensor:
        """Where ``rows`` holds a scored token: bool [C, Tmax]."""
        return self.rows(torch.ones_like(self.places, dtype=torch.bool))

    @property
    def states(self) -> Tensor:
        """int64 [S + C]: every state that a critic values, the one before each scored token, then each last one."""
        return torch.cat([self.scored, self.last])

    @property
    def sequence_lengths(self) -> Tensor:
        """int64 [T]: how many tokens the sequence has that a token is part of, prompt and completion; for a prompt that
        several completions share, the longest one."""
        spans = self.layout.spans
        lengths = [span.prompt + n for span in spans for n in (max(span.completions), *span.completions)]
        counts = [n for span in spans for n in (span.prompt, *span.completions)]
        return torch.from_numpy(np.repeat(lengths, counts)).to(self.tokens.device)

    def padded(self) -> PaddedRows:
        """The batch for a model that can't read the tree: each completion a row of its own behind its prompt."""
        paths = [np.r_[span.start : span.split, branch] for span in self.layout.spans for branch in span.branches]
        width = max(len(path) for path in paths)
        index = np.zeros((len(paths), width), dtype=np.int64)
        real = np.zeros((len(paths), width), dtype=np.int64)
        for row, path in enumerate(paths):
            index[row, : len(path)], real[row, : len(path)] = path, 1
        last = np.arange(len(paths)) * width + [len(path) - 1 for path in paths]
        # A token that is n places before its completion's end is so in its row too.
        completion, column = np.divmod(self.places.cpu().numpy(), self.longest)
        scored = last[completion] - self.lengths.cpu().numpy()[completion] + column
        in_rows = np.zeros(len(self.tokens), dtype=np.int64)
        in_rows[index[real == 1]] = np.flatnonzero(real)  # a completion's token stands in one row only
        arrays = (index, real, scored, last, in_rows[self.step_ends.cpu().numpy()])
        stream, attention_mask, *places = (torch.from_numpy(array).to(self.tokens.device) for array in arrays)
        # Padding is never looked at, so any token serves; 0 exists in every vocabulary.
        return PaddedRows(self.tokens[stream] * attention_mask, attention_mask, stream, *places)


def tree_batch(groups: Sequence[CompletionGroup], device: torch.device | str = "cpu") -> TreeBatch:
    """Lay groups out as one stream.

    Raises ``ValueError`` for no groups, ``DataError`` for an empty prompt, a group without completions, or an empty
    completion: there would be no hidden state to score from, or nothing to score.
    """
    if not groups:
        raise ValueError("a batch needs at least one group")
    tokens, spans, masks, step_ends = [], [], [], []
    start = 0
    for group in groups:
        lengths = tuple(len(completion.tokens) for completion in group.completions)
        if len(group.prompt) == 0 or not lengths or 0 in lengths:
            raise DataError(
                "a group needs a prompt and completions of at least one token each",
                where=group.where or None,
                way_out="leave the row out",
            )
        span = GroupSpan(start, len(group.prompt), lengths)
        tokens += [group.prompt, *(completion.tokens for completion in group.completions)]
        masks += [completion.completion_mask for completion in group.completions]
        step_ends += [
            branch.start + completion.step_ends
            for branch, completion in zip(span.branches, group.completions, strict=True)
            if completion.step_ends is not None
        ]
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
    written = np.concatenate(masks)
    branches = [branch for span in spans for branch in span.branches]
    targets = np.concatenate([np.arange(branch.start, branch.stop) for branch in branches])[written]
    before = np.concatenate([np.arange(branch.start - 1, branch.stop - 1) for branch in branches])
    first = np.concatenate([[0], lengths.cumsum()[:-1]])
    before[first] = np.repeat([span.split - 1 for span in spans], [len(span.completions) for span in spans])
    columns = np.concatenate([np.arange(n) for n in lengths])
    places = np.repeat(np.arange(len(lengths)) * lengths.max(), lengths) + columns
    layout = TreeLayout(put(group_index), put(branch), put(positions), tuple(spans))
    return TreeBatch(
        tokens=stream,
        positions=layout.positions,
        layout=layout,
        scored=put(before[written]),
        targets=stream[put(targets)],
        places=put(places[written]),
        lengths=put(lengths),
        last=put(last),
        step_ends=put(np.concatenate([np.empty(0, dtype=np.int64), *step_ends])),
        group_of=put(group_of),
        num_groups=len(spans),
    )
