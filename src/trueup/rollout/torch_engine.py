"""The default engine: sampling with PyTorch, prompts shared by their completions."""

from __future__ import annotations

import sys
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trueup.errors import DataError, NonFiniteError, OutOfMemoryError, SettingsError
from trueup.models.adapters import plain_model
from trueup.models.check import first_exact, plain_logprobs
from trueup.models.load import DtypeName, context_length, embedding_rows, resolve_dtype
from trueup.records import Completion, CompletionGroup, StopReason
from trueup.rollout.cohort import own_dtype
from trueup.rollout.decoders import Decoder, RowDecoder, TreeDecoder, forced_logprobs, keep_rows
from trueup.rollout.packing import pack_linears
from trueup.rollout.sampling import Sampled, sample
from trueup.rollout.settings import SamplingParams
from trueup.rollout.uniforms import uniforms
from trueup.rollout.weights import copy_weights, sampling_copy
from trueup.runs.memory import is_out_of_memory

CACHE_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}
"""Memory for keys and values, if ``max_batch_tokens`` is not given."""

LOGITS = 16 << 20
"""Logits that are held at a time."""

DRAWN_AHEAD = 64
"""Positions whose random numbers are drawn at a time."""


class TorchEngine:
    """Samples from a copy of a model (see ``trueup.rollout.engine.Engine`` for what ``generate`` gives).

    Every prompt is computed once and its keys and values are shared by its completions; completions leave the batch as
    they end, and prompts join as memory allows. Models that can't do this (the check at load says so, see
    ``trueup.models.check``) are run with transformers' own cache, one row for each completion, with one warning and
    the same distribution.

    ``tokenizer``: needed for stop strings only. ``max_batch_tokens``: the most tokens whose keys and values are held at
    once, a completion counted with the most that it can get; None: as many as 2 GiB hold (8 GiB on a GPU).
    ``dtype``: of the copy, "auto" being bfloat16 where the hardware multiplies it, "same" the model's own. Weights of
    this type share the model's memory, but may be laid out anew for products (``trueup.rollout.packing``): what the
    model learns is sampled from after ``update_weights``. ``compiled``: attention to a completion's own tokens by
    ``torch.compile``, for seconds at its first uses, and less memory and time from then on.

    Raises ``SettingsError`` for a bad setting or where nothing can be compiled, ``ModelError`` if no way of decoding
    reproduces the model's plain forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        max_batch_tokens: int | None = None,
        dtype: DtypeName | Literal["same"] = "auto",
        compiled: bool = False,
    ) -> None:
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise SettingsError(f"{max_batch_tokens} is out of range", where="max_batch_tokens", way_out="1 or more")
        self.tokenizer = tokenizer
        given = plain_model(model)
        self.device: torch.device = given.device
        self.model = sampling_copy(model, given.dtype if dtype == "same" else resolve_dtype(dtype, self.device))
        self.compiled = compiled
        self.decoder = _prepare_decoder(self.model, compiled)
        pack_linears(self.model)
        self.max_batch_tokens = max_batch_tokens

    def update_weights(self, model: nn.Module) -> None:
        """Take over the weights of a model of the same shape, in place; adapters are merged into what they adapt.

        Weights that are shared cost nothing. Raises ``ModelError`` for a model of another shape.
        """
        with torch.no_grad():
            copy_weights(self.model, model)
            pack_linears(self.model)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingParams,
        *,
        requests: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[CompletionGroup]:
        """``sampling.num_completions`` completions of every prompt, int64 [P] token ids; see ``Engine``.

        Raises ``DataError`` for a prompt that is empty, that has tokens which the model doesn't know, or that leaves no
        room in the model's context, ``SettingsError`` for stop strings without a tokenizer, stop tokens that the model
        doesn't know, or a completion that ``max_batch_tokens`` has no room for, ``NonFiniteError`` for logits from
        which nothing can be sampled, and ``OutOfMemoryError``.
        """
        prompts = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        numbers = list(range(len(prompts)) if requests is None else requests)
        if len(numbers) != len(prompts):
            raise SettingsError(f"{len(numbers)} requests for {len(prompts)} prompts", where="requests")
        rooms = self._rooms_for(prompts, sampling)
        try:
            return self._generate(prompts, rooms, numbers, sampling, progress or (lambda number: None))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(self._budget(prompts, rooms), prompts, rooms, sampling.num_completions) from error

    def _generate(
        self,
        prompts: Sequence[np.ndarray],
        rooms: Sequence[int],
        numbers: Sequence[int],
        sampling: SamplingParams,
        progress: Callable[[int], object],
    ) -> list[CompletionGroup]:
        stop = StopRule(sampling, self.tokenizer)
        budget = self._budget(prompts, rooms)
        waiting = deque(self._orders(prompts, rooms, sampling.num_completions, budget))
        lines = Lines(max(rooms, default=0), sampling.seed)
        written: list[list[Any]] = [[None] * sampling.num_completions for _ in prompts]
        running: list[tuple[Any, np.ndarray]] = []
        tokens = torch.empty(0, dtype=torch.int64, device=self.device)
        seen = self._seen([]) if sampling.repetition_penalty != 1 else None
        while waiting or running:
            states = [self.decoder.step([cohort for cohort, _ in running], tokens)] if running else []
            for orders in self._admitted(waiting, sum(cohort.reserved for cohort, _ in running), budget):
                copies = [len(order.completions) for order in orders]
                room = max(order.room for order in orders)
                cohort, state = self.decoder.start([prompts[order.prompt] for order in orders], copies, room)
                running.append((cohort, lines.add(orders, numbers)))
                states.append(state)
                if seen is not None:
                    repeated = [prompts[order.prompt] for order in orders for _ in order.completions]
                    seen = torch.cat([seen, self._seen(repeated)])
            rows = np.concatenate([rows for _, rows in running])
            sampled = self._sample(torch.cat(states), lines.draw(rows), sampling, seen)
            lines.write(rows, sampled)
            progress(len(rows))
            tokens = sampled.tokens
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            reasons = stop.reasons(lines, rows)
            over = reasons > 0
            if over.any():
                for row, reason in zip(rows[over], reasons[over], strict=True):
                    written[lines.prompt[row]][lines.completion[row]] = lines.take(row, REASONS[reason])
                running, order = keep_rows(running, ~over)
                left = torch.from_numpy(order).to(self.device)
                tokens, seen = tokens[left], None if seen is None else seen[left]
        return [
            CompletionGroup(prompt=prompt, completions=tuple(completions))
            for prompt, completions in zip(prompts, written, strict=True)
        ]

    def _rooms_for(self, prompts: Sequence[np.ndarray], sampling: SamplingParams) -> list[int]:
        """The most tokens that each prompt's completions can get."""
        vocabulary = embedding_rows(self.model)
        context = context_length(self.model) or sys.maxsize
        if any(not 0 <= token < vocabulary for token in sampling.stop_tokens):
            raise SettingsError(
                f"the model knows tokens from 0 to {vocabulary - 1}", where=f"stop_tokens {sampling.stop_tokens}"
            )
        for number, prompt in enumerate(prompts):
            where = f"prompt {number}"
            if prompt.ndim != 1 or len(prompt) == 0:
                raise DataError("is not a row of one or more tokens", where=where, way_out="leave it out")
            if prompt.min() < 0 or prompt.max() >= vocabulary:
                raise DataError(
                    f"has tokens outside 0 … {vocabulary - 1}", where=where, way_out="use the model's own tokenizer"
                )
            if len(prompt) >= context:
                raise DataError(
                    f"{len(prompt)} tokens leave no room in the model's context of {context}",
                    where=where,
                    way_out="cut the prompt, or leave it out",
                )
        return [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]

    def _budget(self, prompts: Sequence[np.ndarray], rooms: Sequence[int]) -> int:
        """``max_batch_tokens``, or what there is memory for, but always one completion."""
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        memory = CACHE_BYTES.get(self.device.type, CACHE_BYTES["cuda"])
        longest = max((len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True)), default=1)
        return max(memory // cache_bytes_per_token(self.model, self.compiled), longest)

    def _orders(self, prompts: Sequence[np.ndarray], rooms: Sequence[int], copies: int, budget: int) -> Iterator[Order]:
        """The prompts, those whose completions don't all fit at once several times."""
        for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
            alone, with_one = (self.decoder.reserves([len(prompt)], [count], room) for count in (0, 1))
            if with_one > budget:
                raise SettingsError(
                    f"{len(prompt)} tokens of prompt {number} and a completion of up to {room} don't fit into {budget}",
                    where="max_batch_tokens",
                    way_out=f"{with_one} or more, or a smaller max_new_tokens",
                )
            at_once = (budget - alone) // (with_one - alone)
            for start in range(0, copies, at_once):
                yield Order(number, len(prompt), range(start, min(start + at_once, copies)), room)

    def _admitted(self, waiting: deque[Order], reserved: int, budget: int) -> Iterator[list[Order]]:
        """Cohorts that there is memory for, as many of the next orders as fit.

        While others run, not before a quarter of the memory is free: many small cohorts are slower than a few.
        """
        if not waiting or (reserved and 4 * (budget - reserved) < budget):
            return

        def cohorts(count: int) -> list[list[Order]]:
            orders = list(islice(waiting, count))
            together = self.decoder.together([order.length for order in orders])
            return [[orders[index] for index in indices] for indices in together]

        def need(count: int) -> int:
            return reserved + sum(
                self.decoder.reserves(
                    [order.length for order in orders],
                    [len(order.completions) for order in orders],
                    max(order.room for order in orders),
                )
                for orders in cohorts(count)
            )

        count = bisect_right(range(1, len(waiting) + 1), budget, key=need)
        yield from cohorts(count)
        for _ in range(count):
            waiting.popleft()

    def _seen(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """Which tokens each prompt holds: bool [R, V]."""
        seen = np.zeros((len(prompts), embedding_rows(self.model)), dtype=bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
        return torch.from_numpy(seen).to(self.device)

    def _sample(self, states: Tensor, uniforms: Tensor, sampling: SamplingParams, seen: Tensor | None) -> Sampled:
        """The next token of every row, a bounded number of logits at a time."""
        size = max(1, LOGITS // embedding_rows(self.model))
        parts = [
            sample(
                self.decoder.products(states[start : start + size]),
                uniforms[start : start + size].to(states.device),
                sampling,
                seen=None if seen is None else seen[start : start + size],
                logits_of=self.decoder.logits,
            )
            for start in range(0, len(states), size)
        ]
        return Sampled(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _prepare_decoder(model: Any, compiled: bool) -> Decoder:
    """The decoder that reproduces the model's plain forward pass, prompts shared if possible; sets its attention."""
    candidates = [partial(TreeDecoder, fused=compiled), RowDecoder, partial(RowDecoder, cached=False)]
    candidate, attention, differences = first_exact(model, candidates, plain_logprobs, forced_logprobs)
    if differences:
        warnings.warn(
            f"{type(model).__name__} can't share prompts ({differences[0]}): it samples with one row for each "
            "completion, from the same distribution, but every prompt is computed once per completion",
            stacklevel=3,
        )
    model.config._attn_implementation = attention
    return candidate(model)


def out_of_memory(
    budget: int, prompts: Sequence[np.ndarray], rooms: Sequence[int], num_completions: int
) -> OutOfMemoryError:
    """The message: half of the keys and values that there was room for, and of those that were asked for."""
    asked = sum(len(prompt) + num_completions * room for prompt, room in zip(prompts, rooms, strict=True))
    least = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
    held = min(budget, asked)
    lower = f"--max-batch-tokens {max(least, held // 2)}" if held > least else "a smaller --max-new-tokens"
    return OutOfMemoryError(
        f"out of memory while sampling, with room for {held:,} tokens at once",
        way_out=f"start anew with {lower}",
    )


def cache_bytes_per_token(model: Any, fused: bool) -> int:
    """What the keys and values of one token of a completion take, by the model's config."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * key_heads * width * own_dtype(model.dtype, model.device, fused).itemsize


class Order(NamedTuple):
    """Completions to be written behind one prompt: its number and length, theirs, and the most tokens of each."""

    prompt: int
    length: int
    completions: range
    room: int


class Lines:
    """What has been written so far of the completions in work, on the host: one line each, used again when it is over.

    ``prompt``, ``completion``: int64 [lines], whose it is. ``count``: how many tokens are there, ``limit``: can be.
    """

    def __init__(self, longest: int, seed: int) -> None:
        self.seed = seed
        self.free: list[int] = []
        self.prompt, self.request, self.completion, self.count, self.limit = np.zeros((5, 0), dtype=np.int64)
        self.tokens = np.zeros((0, longest), dtype=np.int64)
        self.logprobs = np.zeros((2, 0, longest), dtype=np.float32)
        self.drawn = np.zeros((0, DRAWN_AHEAD))

    def add(self, orders: Sequence[Order], numbers: Sequence[int]) -> np.ndarray:
        """A line for each completion, in order; their numbers."""
        new = np.array(
            [
                (order.prompt, numbers[order.prompt], completion, 0, order.room)
                for order in orders
                for completion in order.completions
            ]
        )
        if (lacking := len(new) - len(self.free)) > 0:
            self._grow(lacking)
        lines = np.array([self.free.pop() for _ in new])
        self.prompt[lines], self.request[lines], self.completion[lines], self.count[lines], self.limit[lines] = new.T
        return lines

    def _grow(self, more: int) -> None:
        def longer(array: np.ndarray, axis: int = 0) -> np.ndarray:
            return np.pad(array, [(0, more if dim == axis else 0) for dim in range(array.ndim)])

        self.free += range(len(self.tokens), len(self.tokens) + more)
        self.prompt, self.request, self.completion = map(longer, (self.prompt, self.request, self.completion))
        self.count, self.limit, self.tokens, self.drawn = map(longer, (self.count, self.limit, self.tokens, self.drawn))
        self.logprobs = longer(self.logprobs, axis=1)

    def draw(self, lines: np.ndarray) -> Tensor:
        """The random number for the next token of each line: float64 [R]."""
        column = self.count[lines] % DRAWN_AHEAD
        fresh = lines[column == 0]
        if len(fresh):
            positions = self.count[fresh, None] + np.arange(DRAWN_AHEAD)
            self.drawn[fresh] = uniforms(self.seed, self.request[fresh, None], self.completion[fresh, None], positions)
        return torch.from_numpy(self.drawn[lines, column])

    def write(self, lines: np.ndarray, sampled: Sampled) -> None:
        """Put the next token behind each line. Raises ``NonFiniteError`` where there was nothing to sample from."""
        tokens, *logprobs = torch.stack([each.double() for each in sampled]).cpu().numpy()  # waits for the device once
        if not np.isfinite(logprobs).all():
            bad = lines[~np.isfinite(logprobs).all(0)][0]
            raise NonFiniteError(
                f"the model's logits are not finite after {self.count[bad]} tokens",
                where=f"prompt {self.prompt[bad]}, completion {self.completion[bad]}",
                way_out="look at the model's weights: training has diverged, or its precision is too low",
            )
        column = self.count[lines]
        self.tokens[lines, column] = tokens
        self.logprobs[:, lines, column] = logprobs
        self.count[lines] += 1

    def take(self, line: int, reason: StopReason) -> Completion:
        """A line that is over; it is free again."""
        self.free.append(line)
        count = self.count[line]
        sampler_logprobs, untempered_logprobs = self.logprobs[:, line, :count].copy()
        return Completion(
            tokens=self.tokens[line, :count].copy(),
            stop_reason=reason,
            sampler_logprobs=sampler_logprobs,
            untempered_logprobs=untempered_logprobs,
        )


REASONS = (None, StopReason.END, StopReason.STOP, StopReason.LENGTH)


class StopRule:
    """When a completion is over."""

    def __init__(self, sampling: SamplingParams, tokenizer: Any) -> None:
        if sampling.stop_strings and tokenizer is None:
            raise SettingsError(
                "text can't be looked for without a tokenizer",
                where="stop_strings",
                way_out="make the engine with the model's tokenizer",
            )
        if "" in sampling.stop_strings:
            raise SettingsError("an empty text ends everything", where="stop_strings", way_out="leave it out")
        self.tokens = np.array(sampling.stop_tokens, dtype=np.int64)
        self.strings = sampling.stop_strings
        self.tokenizer = tokenizer
        # A token is one byte of text or more. Some more, as the text of the first ones can differ without what stood
        # before them: half a character, a space that is left off.
        self.tail = max((len(text.encode()) for text in self.strings), default=0) + 8

    def reasons(self, lines: Lines, rows: np.ndarray) -> np.ndarray:
        """int64 [R], for each of these lines the index into ``REASONS``, 0 while it is not over."""
        count = lines.count[rows]
        reasons = np.where(count >= lines.limit[rows], REASONS.index(StopReason.LENGTH), 0)
        if self.strings:
            for index, (row, end) in enumerate(zip(rows, count, strict=True)):
                text = self.tokenizer.decode(
                    lines.tokens[row, max(0, end - self.tail) : end].tolist(), clean_up_tokenization_spaces=False
                )
                if any(string in text for string in self.strings):
                    reasons[index] = REASONS.index(StopReason.STOP)
        reasons[np.isin(lines.tokens[rows, count - 1], self.tokens)] = REASONS.index(StopReason.END)
        return reasons
