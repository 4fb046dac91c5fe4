"""Which groups go into which step, and into which micro-batch. Pure functions of their arguments; NumPy only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from trueup.errors import SettingsError
from trueup.records import CompletionGroup, RankedCompletions, Text


def epoch_order(num_groups: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [num_groups]: the order of one epoch, a permutation that depends on the arguments alone.

    It sorts raw words of a bit generator: NumPy keeps these the same from release to release, which it does not
    promise for ``Generator.permutation``, and a run must be repeatable elsewhere.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_groups)
    return np.argsort(words, kind="stable")


def num_steps(num_groups: int, batch_size: int, num_epochs: int) -> int:
    """How many steps ``batches`` makes: the last batch of an epoch may be smaller than the others."""
    if batch_size < 1:
        raise SettingsError(f"batch_size must be at least 1, not {batch_size}")
    return num_epochs * -(-num_groups // batch_size)


def batches(
    num_groups: int, batch_size: int, *, seed: int, num_epochs: int, start_step: int = 0
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(step, epoch, indices) for every step, from ``start_step`` on; both count from 0.

    In each epoch every group comes exactly once; its last batch holds what is left. Since the batch of a step depends
    on nothing but the arguments, a resumed run passes the number of steps already made as ``start_step``.
    """
    total = num_steps(num_groups, batch_size, num_epochs)
    per_epoch = total // num_epochs if num_epochs else 0
    order, order_epoch = np.empty(0, dtype=np.int64), -1
    for step in range(start_step, total):
        epoch, place = divmod(step, per_epoch)
        if epoch != order_epoch:
            order, order_epoch = epoch_order(num_groups, seed, epoch), epoch
        yield step, epoch, order[place * batch_size : (place + 1) * batch_size]


def micro_batches(groups: Sequence[CompletionGroup], tokens_per_batch: int) -> list[list[int]]:
    """Cut a step's groups into micro-batches of at most ``tokens_per_batch`` tokens: lists of indices into ``groups``.

    Longest first, so that lengths within a micro-batch are alike and the largest one comes first (where memory runs
    out, it does so at once). A group that is larger than the limit makes a micro-batch of its own.
    """
    if tokens_per_batch < 1:
        raise SettingsError(f"tokens_per_batch must be at least 1, not {tokens_per_batch}")
    cut: list[list[int]] = []
    room = 0
    for index in sorted(range(len(groups)), key=lambda index: (-groups[index].num_tokens, index)):
        if not cut or groups[index].num_tokens > room:
            cut.append([])
            room = tokens_per_batch
        cut[-1].append(index)
        room -= groups[index].num_tokens
    return cut


def first_human_turn(prompt: Text) -> str:
    """What a conversation began with: its first user turn. Plain text stands for itself."""
    if isinstance(prompt, str):
        return prompt.strip()
    turns = [turn for turn in prompt if turn["role"] == "user"] or list(prompt)
    return str(turns[0]["content"]).strip() if turns else ""


def is_held_out(key: str, fraction: float) -> bool:
    """Whether what ``key`` names belongs to the held-out part: a hash of it, read as a number in [0, 1), is below
    ``fraction``. It does not depend on order, on the other rows or on a seed, so that a larger file, a later run or
    another tool draws the same line; and with a larger fraction what was held out stays so.
    """
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def _prompt_key(example: RankedCompletions) -> str:
    # A text without a prompt is known by itself: otherwise all such texts would fall on one side.
    return first_human_turn(example.prompt) or first_human_turn(example.completions[0])


def split_holdout(
    examples: Sequence[RankedCompletions],
    fraction: float,
    key: Callable[[RankedCompletions], str] = _prompt_key,
) -> tuple[list[RankedCompletions], list[RankedCompletions]]:
    """(train, held out): examples with the same key, by default the prompt's first human turn, stay together.

    Raises ``SettingsError`` unless 0 ≤ fraction < 1.
    """
    if not 0.0 <= fraction < 1.0:
        raise SettingsError(f"the held-out fraction must be at least 0 and below 1, not {fraction}")
    parts: tuple[list[RankedCompletions], list[RankedCompletions]] = ([], [])
    for example in examples:
        parts[is_held_out(key(example), fraction)].append(example)
    return parts
