"""Keys and values while completions are written, and attention over them.

A cohort is some prompts and the completions that go on from them, all with as many tokens as each other. Prompts are
kept once each, ``[N, H_kv, P, D]``, padded to the longest of the cohort; completions behind each other as they are
written, ``[R, H_kv, T, D]``. A row's query looks at its prompt and at its own completion, and the two parts are weighed
by one softmax over the scores of both. On a CPU the completions' keys and values are kept in float32, as batched
products of one row each are several times faster in it than in half precision; the products with the prompts have many
rows. ``fused`` compiles what is done for each row to loops that read keys and values of any type once.

The layouts here go down the model's forward pass as the tree's does (``trueup.models.attention``), first a
``PromptLayout`` and then a ``StepLayout`` for each further token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental import _config as shape_config

from trueup.errors import SettingsError
from trueup.models.attention import tree_attention
from trueup.models.tree import GroupSpan, TreeLayout

ROOM = 64
"""Tokens of each completion that there is room for at first; it doubles when it is used up."""


@dataclass(slots=True)
class Layer:
    """One layer's keys and values: [N, H_kv, P, D] of the prompts, [R, H_kv, T, D] of the completions."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class Grid(NamedTuple):
    """The rows group by group, where they don't stand so already: ``rows`` [N, G], the row at each place (any row where
    a group has fewer than G), and ``places`` [R], each row's place in the flattened grid."""

    rows: Tensor
    places: Tensor


def own_dtype(dtype: torch.dtype, device: torch.device, fused: bool) -> torch.dtype:
    """The type in which the completions' keys and values are kept, where the model has this one."""
    return dtype if fused or device.type != "cpu" else torch.promote_types(dtype, torch.float32)


class Cohort:
    """``lengths``: of the N prompts. ``copies``: completions of each. ``room``: tokens that a completion can get.
    ``fused``: see above.

    ``group``: int64 [R], the prompt of each row. ``age``: tokens of each completion whose keys are there.
    """

    def __init__(
        self, lengths: Sequence[int], copies: Sequence[int], room: int, device: torch.device, fused: bool = False
    ) -> None:
        self.lengths = np.array(lengths)
        self.group = np.repeat(np.arange(len(lengths)), copies)
        self.room = room
        self.device = device
        self.fused = fused
        self.width = int(self.lengths.max())
        self.age = 0
        self.layers: list[Layer] = []
        self._capacity = (len(self.group), len(self.lengths))
        self._grid: Grid | int | None = None

    @property
    def reserved(self) -> int:
        """Tokens whose keys and values it may come to hold."""
        rows, groups = self._capacity
        return rows * self.room + groups * self.width

    @property
    def positions(self) -> np.ndarray:
        """int64 [R]: where each row's next token stands."""
        return self.lengths[self.group] + self.age

    # --- keys and values

    def add_layer(self, key: Tensor, value: Tensor, places: Sequence[slice]) -> None:
        """Take over the prompts' keys and values out of a stream [1, H_kv, tokens, D]; ``places``: each prompt's."""

        def prompts(stream: Tensor) -> Tensor:
            kept = stream.new_zeros(len(self.lengths), stream.shape[1], self.width, stream.shape[3])
            for prompt, place in zip(kept, places, strict=True):
                prompt[:, : place.stop - place.start] = stream[0, :, place]
            return kept

        def completions(stream: Tensor) -> Tensor:
            size = len(self.group), stream.shape[1], min(ROOM, self.room), stream.shape[3]
            return stream.new_empty(size, dtype=own_dtype(stream.dtype, stream.device, self.fused))

        self.layers.append(Layer(prompts(key), prompts(value), completions(key), completions(value)))

    def append(self, layer: Layer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the next token's keys and values, [R, H_kv, D], behind the rows'; returns all, [R, H_kv, age + 1, D]."""
        if self.age == layer.keys.shape[2]:
            more = min(2 * self.age, self.room) - self.age
            layer.keys, layer.values = (
                torch.cat([each, each.new_empty(*each.shape[:2], more, each.shape[3])], 2)
                for each in (layer.keys, layer.values)
            )
        rows = len(self.group)
        layer.keys[:rows, :, self.age] = key
        layer.values[:rows, :, self.age] = value
        return layer.keys[:rows, :, : self.age + 1], layer.values[:rows, :, : self.age + 1]

    def keep(self, alive: np.ndarray) -> np.ndarray:
        """Let rows go: bool [R] → int64, the old number of each row that is left, in their new order.

        Rows from the end take the places of those that go; prompts without rows go in the same way.
        """
        order = _moved_up(alive)
        group = self.group[order]
        used = np.isin(np.arange(len(self.lengths)), group)
        groups = _moved_up(used)
        number = np.zeros(len(self.lengths), dtype=np.int64)
        number[groups] = np.arange(len(groups))
        for layer in self.layers:
            for each in (layer.keys, layer.values):
                _move(each[:, :, : self.age], order)
            for each in (layer.prompt_keys, layer.prompt_values):
                _move(each, groups)
        self.group, self.lengths, self._grid = number[group], self.lengths[groups], None
        self._shrink()
        return order

    def _shrink(self) -> None:
        """Give memory back when half of it is unused."""
        rows, groups = self._capacity
        if 2 * len(self.group) <= rows:
            rows = len(self.group)
            for layer in self.layers:
                layer.keys, layer.values = layer.keys[:rows].clone(), layer.values[:rows].clone()
        if 2 * len(self.lengths) <= groups:
            groups, self.width = len(self.lengths), int(self.lengths.max(initial=0))
            for layer in self.layers:
                layer.prompt_keys = layer.prompt_keys[:groups, :, : self.width].clone()
                layer.prompt_values = layer.prompt_values[:groups, :, : self.width].clone()
        self._capacity = (rows, groups)

    # --- attention

    @property
    def grid(self) -> Grid | int:
        """How the rows stand: each prompt's number of completions where these follow each other, else a ``Grid``."""
        if self._grid is None:
            counts = np.bincount(self.group, minlength=len(self.lengths))
            if np.array_equal(self.group, np.repeat(np.arange(len(counts)), counts[0])):
                self._grid = int(counts[0])
            else:
                order = np.argsort(self.group, kind="stable")
                column = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
                rows = np.zeros((len(counts), counts.max()), dtype=np.int64)
                rows[self.group[order], column] = order
                places = np.empty_like(order)
                places[order] = self.group[order] * counts.max() + column
                self._grid = Grid(self._put(rows), self._put(places))
        return self._grid

    def prompt_bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[R, 1, 1, P]: 0 where a row's next token sees the prompt's key, −∞ elsewhere; None if all see all."""
        column, lengths = np.arange(self.width), self.lengths[:, None]
        seen = column < lengths
        if window is not None:
            seen = seen & (lengths + self.age - column < window)
        if seen.all():
            return None
        bias = self._put(np.where(seen, 0.0, -np.inf)).to(dtype)
        return bias[self._put(self.group), None, None]

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _moved_up(alive: np.ndarray) -> np.ndarray:
    """Who stands where when the last ones take the places of those that go."""
    count = int(alive.sum())
    order = np.arange(count)
    order[~alive[:count]] = count + np.flatnonzero(alive[count:])
    return order


def _move(rows: Tensor, order: np.ndarray) -> None:
    places = np.flatnonzero(order != np.arange(len(order)))
    if len(places):
        put = torch.from_numpy(places).to(rows.device)
        rows[put] = rows[torch.from_numpy(order[places]).to(rows.device)]


@dataclass(eq=False)
class PromptLayout:
    """The prompts of one cohort behind each other, as a stream: every one a group without completions."""

    cohort: Cohort
    tree: TreeLayout = field(init=False)

    def __post_init__(self) -> None:
        lengths = self.cohort.lengths
        starts = lengths.cumsum() - lengths
        positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        group = self.cohort._put(np.repeat(np.arange(len(lengths)), lengths))
        spans = [
            GroupSpan(start, 0, (length,)) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        self.tree = TreeLayout(group, torch.zeros_like(group), self.cohort._put(positions), tuple(spans))

    @property
    def last(self) -> Tensor:
        """int64 [N]: where in the stream each prompt ends."""
        return self.cohort._put(self.cohort.lengths.cumsum() - 1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        self.cohort.add_layer(key, value, [slice(span.start, span.stop) for span in self.tree.spans])
        return tree_attention(query, key, value, self.tree, **options)


@dataclass(eq=False)
class StepLayout:
    """One further token of every row of some cohorts, as a stream: their rows one after the other.

    The stream may go on behind them with padding, whose attention is 0.
    """

    cohorts: Sequence[Cohort]
    layer: int = 0
    biases: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """[1, H, tokens, D] → [1, H, tokens, D_value], as ``[1, tokens, H, D_value]`` in memory."""
        outs, start = [], 0
        for number, cohort in enumerate(self.cohorts):
            if (number, window) not in self.biases:
                wide = torch.promote_types(query.dtype, torch.float32)
                self.biases[number, window] = cohort.prompt_bias(window, wide)
            q, k, v = (each[0, :, start : start + len(cohort.group)].transpose(0, 1) for each in (query, key, value))
            layer = cohort.layers[self.layer]
            keys, values = cohort.append(layer, k, v)
            if window is not None:
                keys, values = keys[:, :, -window:], values[:, :, -window:]
            bias = self.biases[number, window]
            outs.append(_attend(cohort, q, layer, keys, values, bias, scaling, softcap, sinks))
            start += len(cohort.group)
        self.layer += 1
        if start < query.shape[2]:
            outs.append(outs[0].new_zeros(query.shape[2] - start, *outs[0].shape[1:]))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).transpose(0, 1)[None]


def _attend(
    cohort: Cohort,
    query: Tensor,
    layer: Layer,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> Tensor:
    """One cohort's rows, [R, H, D], against their prompts and completions → [R, H, D_value]; options as of ``mix``."""
    groups, grid = len(cohort.lengths), cohort.grid
    own = query.unflatten(1, (keys.shape[1], -1))  # [R, H_kv, copies, D]: heads that share a key ask side by side
    prompt_keys, prompt_values = layer.prompt_keys[:groups], layer.prompt_values[:groups]

    def to_grid(rows: Tensor) -> Tensor:
        """[R, H_kv, copies, …] → [N, H_kv, G · copies, …]"""
        places = rows.unflatten(0, (groups, grid)) if isinstance(grid, int) else rows[grid.rows]
        return places.transpose(1, 2).flatten(2, 3)

    def to_rows(places: Tensor) -> Tensor:
        """And back."""
        flat = places.unflatten(2, (-1, own.shape[2])).transpose(1, 2).flatten(0, 1)
        return flat if isinstance(grid, int) else flat[grid.places]

    prompt_scores = to_rows(to_grid(own) @ prompt_keys.mT)
    # A single key would be compiled for itself.
    how = _compiled_mix if cohort.fused and keys.shape[2] > 1 else mix
    of_prompt, from_own = how(prompt_scores, own, keys, values, bias, *options)
    return (to_rows(to_grid(of_prompt) @ prompt_values) + from_own).flatten(1, 2).to(query.dtype)


def mix(
    prompt_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """One softmax over the scores of the prompt [R, H_kv, C, P] and of the row's own tokens.

    Gives the prompt's weights, [R, H_kv, C, P], and what comes from the own tokens, [R, H_kv, C, D_value]. ``fused``
    writes products as sums, of which a compiler makes loops that read each key and value once.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    width = prompt_scores.shape[-1]
    query = query.to(wide if fused else keys.dtype)
    own_scores = (query.unsqueeze(-2) * keys.unsqueeze(-3)).sum(-1) if fused else query @ keys.mT
    scores = torch.cat([prompt_scores.to(wide), own_scores.to(wide)], -1) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores[..., :width] += bias
    if sinks is not None:
        column = sinks.to(wide).view(1, keys.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)
    of_own = weights[..., width : width + keys.shape[2]]
    from_own = (of_own.unsqueeze(-1) * values.unsqueeze(-3)).sum(-2) if fused else of_own.to(values.dtype) @ values
    return weights[..., :width].to(prompt_scores.dtype), from_own


def _compiled_mix(prompt_scores: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    # Sizes that happen to be equal, and strides, would be compiled for themselves too.
    with shape_config.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return _fused_mix(prompt_scores.contiguous(), *others)
        except BackendCompilerFailed as error:
            raise SettingsError(
                f"PyTorch can't compile here: {str(error).splitlines()[0]}",
                where="compile",
                way_out="install a C++ compiler (Debian: apt install g++), or sample without",
            ) from error


@partial(torch.compile, dynamic=True)
def _fused_mix(*arguments: Any) -> tuple[Tensor, Tensor]:
    return mix(*arguments, fused=True)
