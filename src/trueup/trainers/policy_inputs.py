"""What the online loop reads: prompts, with the columns that rewards look at, in an endless order of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trueup.data.chat import Prompts, completion_text, load_prompts, stop_token_ids
from trueup.data.collate import epoch_order, first_human_turn, is_held_out, num_steps
from trueup.data.prompts import Request, requests_fingerprint
from trueup.data.settings import TokenizeSettings
from trueup.errors import DataError, SettingsError
from trueup.models.load import context_length
from trueup.records import CompletionGroup
from trueup.rewards.samples import Samples
from trueup.trainers.fingerprint import tokenizer_fingerprint
from trueup.trainers.policy_settings import PolicySettings


@dataclass(frozen=True)
class PolicyInputs:
    """What a run reads."""

    requests: tuple[Request, ...]
    """The training prompts, numbered in the order of the data."""
    held_out: tuple[Request, ...]
    num_steps: int
    """Optimiser steps in all."""
    tokenizer: Any
    how: TokenizeSettings
    seed: int
    fingerprints: dict[str, str]

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        return tuple(stop_token_ids(self.tokenizer, self.how))

    def draw(self, start: int, count: int) -> list[Request]:
        """Requests number ``start`` … ``start + count − 1``: epoch after epoch, each in an order of its own."""
        drawn = []
        for number in range(start, start + count):
            epoch, place = divmod(number, len(self.requests))
            _, row, tokens = self.requests[self._order(epoch)[place]]
            drawn.append(Request(number, row, tokens))
        return drawn

    def _order(self, epoch: int) -> np.ndarray:
        if self._orders.get("epoch") != epoch:
            self._orders.update(epoch=epoch, order=epoch_order(len(self.requests), self.seed, epoch))
        return self._orders["order"]

    @cached_property
    def _orders(self) -> dict[str, Any]:
        return {}

    def samples(self, requests: Sequence[Request], groups: Sequence[CompletionGroup]) -> Samples:
        """Every completion of the groups as rewards get it, in the order of the groups."""
        pairs = [(request, each) for request, group in zip(requests, groups, strict=True) for each in group.completions]
        names = {name for request in requests for name in request.row.columns}
        return Samples(
            prompts=[request.row.prompt for request, _ in pairs],
            completions=[completion_text(self.tokenizer, c.tokens, r.row.prompt, self.how) for r, c in pairs],
            completion_ids=[completion.tokens for _, completion in pairs],
            truncated=[completion.truncated for _, completion in pairs],
            columns={name: [request.row.columns.get(name) for request, _ in pairs] for name in sorted(names)},
            where=[request.row.where for request, _ in pairs],
        )


def load_policy_inputs(
    settings: PolicySettings, model: Any, tokenizer: Any, *, data: Any, eval_data: Any, say: Callable[[str], None]
) -> PolicyInputs:
    """Read, split and tokenise the prompts; ``data`` and ``eval_data`` take the place of the settings'.

    ``num_epochs`` counts passes over the prompts, one rollout taking ``batch_size`` of them. Raises ``SettingsError``
    without data and where prompt and completion don't fit into the model's context, ``DataError`` for what can't be
    read and where no prompt is left.
    """
    source = settings.data if data is None else data
    held_out_source = settings.eval_data if eval_data is None else eval_data
    if isinstance(source, tuple | list) and not source:
        raise SettingsError("no prompts are given", where="--data", way_out="--data FILE.jsonl")
    room = (context_length(model) or settings.max_length + settings.max_new_tokens) - settings.max_new_tokens
    if room < 1:
        raise SettingsError(
            f"the model reads {context_length(model):,} tokens, so none would be left for a prompt",
            where="--max-new-tokens",
            way_out="lower it",
        )
    how = TokenizeSettings.of(settings, max_length=min(settings.max_length, room))

    def read(source: Any, limit: int | None = None) -> Prompts:
        return load_prompts(source, tokenizer, settings=how, limit=limit)

    read_in = read(source, settings.limit)
    train, held_out = split_prompts(read_in, settings.holdout)
    if held_out_source is not None and len(held_out_source):
        evaluated = read(held_out_source)
        held_out = numbered(zip(evaluated.rows, evaluated.tokens, strict=True))
        say(f"held-out data: {evaluated.report.summary()}")
    say(f"data: {read_in.report.summary()}; {len(train):,} prompts to learn from, {len(held_out):,} held out")
    if seen := num_seen(held_out, train):
        say(f"{seen:,} of the held-out prompts are training prompts too: an evaluation then shows what was memorised")
    if not train:
        raise DataError("no prompt is left to learn from", where="--holdout", way_out="lower it")
    rollouts = num_steps(len(train), settings.batch_size, settings.num_epochs)
    return PolicyInputs(
        requests=train,
        held_out=held_out,
        num_steps=settings.max_steps or rollouts * settings.steps_per_rollout,
        tokenizer=tokenizer,
        how=how,
        seed=settings.seed,
        fingerprints={
            "training data": requests_fingerprint(train),
            "held-out data": requests_fingerprint(held_out),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        },
    )


def split_prompts(prompts: Prompts, holdout: float) -> tuple[tuple[Request, ...], tuple[Request, ...]]:
    """(train, held out): prompts that begin with the same human turn stay together, as in the offline loops."""
    parts: tuple[list, list] = ([], [])
    for row, tokens in zip(prompts.rows, prompts.tokens, strict=True):
        parts[is_held_out(first_human_turn(row.prompt), holdout)].append((row, tokens))
    return numbered(parts[0]), numbered(parts[1])


def num_seen(held_out: Sequence[Request], train: Sequence[Request]) -> int:
    """How many held-out prompts are, token for token, training prompts."""
    known = {request.tokens.tobytes() for request in train}
    return sum(request.tokens.tobytes() in known for request in held_out)


def numbered(pairs: Any) -> tuple[Request, ...]:
    return tuple(Request(number, row, tokens) for number, (row, tokens) in enumerate(pairs))
