"""Two ways to go on from prompts token by token: prompts shared by their completions, or one row for each completion.

Both give the same distribution. The first needs what the tree batch needs (see ``trueup.models.check``): tokens that
meet in attention only, through transformers' interface. The second is transformers' own cache, for every other model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trueup.models.attention import no_mask
from trueup.models.scorer import head_transform
from trueup.models.tree import TreeBatch
from trueup.objectives.products import grid_padding
from trueup.rollout.cohort import Cohort, PromptLayout, StepLayout
from trueup.rollout.sampling import as_logits

PREFILL = 16384
"""Tokens of prompts in one forward pass, if there is more than one."""


class Rows(Protocol):
    """Completions that are written together, R of them, from prompts that began together."""

    @property
    def reserved(self) -> int:
        """Tokens whose keys and values they may come to hold."""
        ...

    def keep(self, alive: np.ndarray) -> np.ndarray:
        """Let rows go: bool [R] → int64, the old number of each row that is left, in their new order."""
        ...


class Decoder(Protocol):
    """Turns tokens into logits. What stands between is its own: "states", one row for each row of the batch."""

    path: str

    def together(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which prompts of these lengths may begin in one cohort."""
        ...

    def reserves(self, lengths: Sequence[int], copies: Sequence[int], room: int) -> int:
        """``Rows.reserved`` of the cohort that ``start`` would give."""
        ...

    def start(self, prompts: Sequence[np.ndarray], copies: Sequence[int], room: int) -> tuple[Any, Tensor]:
        """Begin a cohort: its rows, prompt by prompt, and their states [R, …]."""
        ...

    def step(self, cohorts: Sequence[Any], tokens: Tensor) -> Tensor:
        """Read the next token of every row, int64 [R]; their states."""
        ...

    def products(self, states: Tensor) -> Tensor:
        """What the head makes of the states: [R, …] → [R, V], in the model's type."""
        ...

    def logits(self, products: Tensor) -> Tensor:
        """What the model makes of these, number by number: a new tensor, float32 or wider."""
        ...


class TreeDecoder:
    """Every prompt is computed once, and its keys and values are shared by its completions."""

    path = "tree"

    def __init__(self, model: Any, *, fused: bool = False) -> None:
        """``fused``: attention as compiled loops (see ``trueup.rollout.cohort``)."""
        self.model = model
        self.fused = fused

    def together(self, lengths: Sequence[int]) -> list[list[int]]:
        """Of similar lengths, as they are padded to the longest: at most twice the shortest and a little."""
        cohorts: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
            longest = min(2 * lengths[cohorts[-1][0]] + 64, PREFILL // (len(cohorts[-1]) + 1)) if cohorts else 0
            if lengths[index] <= longest:
                cohorts[-1].append(index)
            else:
                cohorts.append([index])
        return cohorts

    def reserves(self, lengths: Sequence[int], copies: Sequence[int], room: int) -> int:
        return len(lengths) * max(lengths) + sum(copies) * room

    def start(self, prompts: Sequence[np.ndarray], copies: Sequence[int], room: int) -> tuple[Cohort, Tensor]:
        device = self.model.device
        cohort = Cohort([len(prompt) for prompt in prompts], copies, room, device, self.fused)
        layout = PromptLayout(cohort)
        tokens = torch.from_numpy(np.concatenate(prompts)).to(device)
        states = self._forward(tokens, layout.tree.positions, layout, padding=grid_padding)
        rows = torch.from_numpy(cohort.group).to(device)
        return cohort, states[layout.last][rows]

    def step(self, cohorts: Sequence[Cohort], tokens: Tensor) -> Tensor:
        positions = torch.from_numpy(np.concatenate([cohort.positions for cohort in cohorts])).to(tokens.device)
        states = self._forward(tokens, positions, StepLayout(cohorts), padding=_few_sizes)
        for cohort in cohorts:
            cohort.age += 1
        return states[: len(tokens)]

    def _forward(self, tokens: Tensor, positions: Tensor, layout: Any, padding: Any) -> Tensor:
        more = padding(len(tokens), self.model.get_input_embeddings().weight)
        return self.model.base_model(
            input_ids=nn.functional.pad(tokens, (0, more))[None],
            position_ids=nn.functional.pad(positions, (0, more))[None],
            attention_mask=no_mask(tokens.device),
            layout=layout,
            use_cache=False,
        ).last_hidden_state[0]

    def products(self, states: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(states)

    def logits(self, products: Tensor) -> Tensor:
        scale, softcap = head_transform(self.model)
        logits = as_logits(products)
        logits = logits if scale == 1 else logits.mul_(scale)
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _few_sizes(length: int, like: Tensor) -> int:
    """How many rows to add so that a CPU compiles its products for few sizes (see ``grid_padding``)."""
    return -length % 8 if grid_padding(17, like) or length < 128 else grid_padding(length, like)


class RowDecoder:
    """One row for each completion, its prompt repeated, with transformers' own cache: for models that mix tokens
    outside of attention, or in an attention that takes no layout. Prompts of one length begin together, so that nothing
    is padded: what runs along the sequence would run over padding too."""

    path = "rows"

    def __init__(self, model: Any, *, cached: bool = True) -> None:
        """``cached`` False reads everything again for every token, where a model's cache gives other numbers."""
        self.model = model
        self.cached = cached
        can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": cached} | ({"logits_to_keep": 1} if can_leave_out else {})

    def together(self, lengths: Sequence[int]) -> list[list[int]]:
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        return [list(same) for _, same in groupby(order, key=lambda index: lengths[index])]

    def reserves(self, lengths: Sequence[int], copies: Sequence[int], room: int) -> int:
        return sum(copies) * (max(lengths) + room)

    def start(self, prompts: Sequence[np.ndarray], copies: Sequence[int], room: int) -> tuple[CachedRows, Tensor]:
        rows = np.repeat(np.stack(prompts), copies, axis=0)
        cohort = CachedRows(len(rows), rows.shape[1] + room)
        return cohort, self._forward(cohort, torch.from_numpy(rows).to(self.model.device))

    def step(self, cohorts: Sequence[CachedRows], tokens: Tensor) -> Tensor:
        parts = tokens.split([cohort.count for cohort in cohorts])
        return torch.cat([self._forward(cohort, part[:, None]) for cohort, part in zip(cohorts, parts, strict=True)])

    def _forward(self, cohort: CachedRows, tokens: Tensor) -> Tensor:
        slots = cohort.slots(tokens.device)
        # 0 exists in every vocabulary.
        new = tokens.new_zeros(cohort.width, tokens.shape[1]).index_copy(0, slots, tokens)
        cohort.tokens = new if cohort.tokens is None else torch.cat([cohort.tokens, new], 1)
        output = self.model(
            input_ids=new if self.cached else cohort.tokens,
            attention_mask=torch.ones_like(cohort.tokens),
            past_key_values=cohort.cache,
            **self._options,
        )
        cohort.cache = output.past_key_values if self.cached else None
        return output.logits[slots, -1]

    def products(self, states: Tensor) -> Tensor:
        return states

    def logits(self, products: Tensor) -> Tensor:
        return as_logits(products)


class CachedRows:
    """``count`` completions, each with a row of a cache of transformers, and rows of completions that are over.

    Not every model's cache can let rows go, so they stay until the last one is over.
    """

    def __init__(self, count: int, length: int) -> None:
        self.width = self.count = count
        self.reserved = count * length
        self.tokens: Tensor | None = None
        """int64 [width, L]: what has been read."""
        self.cache: Any = None
        self._slots = np.arange(count)

    def keep(self, alive: np.ndarray) -> np.ndarray:
        self._slots = self._slots[alive]
        self.count = len(self._slots)
        return np.flatnonzero(alive)

    def slots(self, device: torch.device) -> Tensor:
        return torch.from_numpy(self._slots).to(device)


def forced_logprobs(decoder: Decoder, batch: TreeBatch) -> Tensor:
    """Log-probs [S] of a batch's completions, read as if they had just been written: what the check at load compares.

    Rows go as their completions end, so that the rest moves up.
    """
    stream = batch.tokens.cpu().numpy()
    spans = batch.layout.spans
    prompts = [stream[span.start : span.split] for span in spans]
    written = [stream[branch] for span in spans for branch in span.branches]
    first = np.cumsum([0, *(len(span.completions) for span in spans)])
    running: list[tuple[Any, np.ndarray]] = []
    states = []
    for together in decoder.together([len(prompt) for prompt in prompts]):
        copies = [len(spans[index].completions) for index in together]
        rows = np.concatenate([np.arange(first[index], first[index + 1]) for index in together])
        cohort, state = decoder.start([prompts[index] for index in together], copies, batch.longest)
        running.append((cohort, rows))
        states.append(state)
    scores = torch.zeros(len(written), batch.longest, device=batch.tokens.device)
    for position in range(batch.longest):
        rows = np.concatenate([rows for _, rows in running])
        tokens = torch.tensor([written[row][position] for row in rows], device=batch.tokens.device)
        logprobs = decoder.logits(decoder.products(torch.cat(states))).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        scores[torch.from_numpy(rows), position] = logprobs.float()
        running, order = keep_rows(running, np.array([len(written[row]) > position + 1 for row in rows]))
        if not running:
            break
        states = [decoder.step([cohort for cohort, _ in running], tokens[torch.from_numpy(order)])]
    return scores[batch.row_mask]


def keep_rows(
    running: Sequence[tuple[Any, np.ndarray]], alive: np.ndarray
) -> tuple[list[tuple[Any, np.ndarray]], np.ndarray]:
    """Let rows of all cohorts go, and cohorts without rows.

    ``running``: each cohort, and something [R] for each of its rows, which moves with them. ``alive``: bool, of all
    rows one cohort after the other. Also returns the old number of each row that is left.
    """
    left, orders = [], []
    for (cohort, rows), start in _with_starts(running):
        mine = alive[start : start + len(rows)]
        if not mine.any():
            continue
        order = np.arange(len(rows)) if mine.all() else cohort.keep(mine)
        left.append((cohort, rows[order]))
        orders.append(start + order)
    return left, np.concatenate([np.empty(0, dtype=np.int64), *orders])


def _with_starts(running: Sequence[tuple[Any, np.ndarray]]) -> Iterator[tuple[tuple[Any, np.ndarray], int]]:
    start = 0
    for pair in running:
        yield pair, start
        start += len(pair[1])
