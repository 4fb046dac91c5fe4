"""Which groups go into which step, and into which micro-batch; which share their prompt, and what of it is trained.

Pure functions of their arguments; NumPy only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from trueup.errors import DataError, SettingsError
from trueup.records import CompletionGroup, RankedCompletions, Text

MOST_SIBLINGS = 8
"""How many rows of one prompt an epoch's order keeps together: enough for seven eighths of all that sharing can save,
and few enough that a prompt with thousands of rows does not fill step after step."""


def epoch_order(num_groups: int, seed: int, epoch: int, families: np.ndarray | None = None) -> np.ndarray:
    """int64 [num_groups]: the order of one epoch, a permutation that depends on the arguments alone.

    It sorts raw words of a bit generator: NumPy keeps these the same from release to release, which it does not
    promise for ``Generator.permutation``, and a run must be repeatable elsewhere. ``families``, int64 [num_groups]:
    groups of the same number come next to each other, see ``siblings_together``.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(2 * num_groups)
    order = np.argsort(words[:num_groups], kind="stable")
    return order if families is None else siblings_together(order, words[num_groups:], families)


def num_steps(num_groups: int, batch_size: int, num_epochs: int) -> int:
    """How many steps ``batches`` makes: the last batch of an epoch may be smaller than the others."""
    if batch_size < 1:
        raise SettingsError(f"batch_size must be at least 1, not {batch_size}")
    return num_epochs * -(-num_groups // batch_size)


def prompt_families(groups: Sequence[CompletionGroup]) -> np.ndarray:
    """int64 [num_groups]: groups whose prompts have the same tokens have the same number.

    A prompt of one token is alone: it stands before everything (a start token, or a text's first token) and nothing is
    saved by computing it once.
    """
    numbers: dict[bytes | int, int] = {}
    keys = (
        group.prompt.astype(np.int64).tobytes() if len(group.prompt) > 1 else index
        for index, group in enumerate(groups)
    )
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def siblings_together(
    order: np.ndarray, deal: np.ndarray, families: np.ndarray, most: int = MOST_SIBLINGS
) -> np.ndarray:
    """int64 [num_groups]: ``order``, a permutation, with the members of a family next to each other.

    A family larger than ``most`` is dealt out in parts of that size, by rank in ``deal`` (random numbers, one a group).
    Each part stands where ``order`` has one fixed member of the family, so that none comes sooner because it is large.
    If ``order`` and ``deal`` are random and independent, every member is as likely in every place of its family. Where
    no two are of one family, this is ``order``.
    """
    place = np.argsort(order)
    by_number = np.lexsort((np.arange(len(order)), families))
    by_deal = np.lexsort((deal, families))
    first = np.searchsorted(families[by_number], families[by_number])
    rank = np.arange(len(order)) - first
    anchor = np.empty_like(place)
    anchor[by_deal] = place[by_number[first + rank // most * most]]
    return np.lexsort((deal, anchor))


def batches(
    num_groups: int,
    batch_size: int,
    *,
    seed: int,
    num_epochs: int,
    start_step: int = 0,
    families: np.ndarray | None = None,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(step, epoch, indices) for every step, from ``start_step`` on; both count from 0.

    In each epoch every group comes exactly once; its last batch holds what is left. ``families`` (int64 [num_groups])
    keeps groups of the same number together, see ``siblings_together``. Since the batch of a step depends on nothing
    but the arguments, a resumed run passes the number of steps already made as ``start_step``.
    """
    total = num_steps(num_groups, batch_size, num_epochs)
    per_epoch = total // num_epochs if num_epochs else 0
    order, order_epoch = np.empty(0, dtype=np.int64), -1
    for step in range(start_step, total):
        epoch, place = divmod(step, per_epoch)
        if epoch != order_epoch:
            order, order_epoch = epoch_order(num_groups, seed, epoch, families), epoch
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


def merge_prompts(groups: Sequence[CompletionGroup], tokens_per_batch: int) -> list[CompletionGroup]:
    """Groups with the same prompt as one group with all their completions, in the order in which prompts come.

    Completions that are alike stay as many as they are. A merged group has at most ``tokens_per_batch`` tokens, so that
    it fits into a micro-batch; what is beyond that becomes another group of the same prompt. Raises ``DataError`` for a
    group with a margin or labels: they are of the group's own completions, and mean nothing among others.
    """
    for group in groups:
        if group.margin is not None or group.desirable is not None:
            raise DataError(
                "completions that are compared or labelled can't be merged with others of their prompt",
                where=group.where or None,
                way_out="leave out margin and desirable, or keep the rows apart (--no-share-prompts)",
            )
    merged: list[list[CompletionGroup]] = []
    newest: dict[int, int] = {}
    sizes: list[int] = []
    for family, group in zip(prompt_families(groups).tolist(), groups, strict=True):
        at, added = newest.get(family), group.num_tokens - len(group.prompt)
        if at is not None and sizes[at] + added <= tokens_per_batch:
            merged[at].append(group)
            sizes[at] += added
        else:
            newest[family] = len(merged)
            merged.append([group])
            sizes.append(group.num_tokens)
    return [siblings[0] if len(siblings) == 1 else _merged(siblings) for siblings in merged]


def _merged(siblings: Sequence[CompletionGroup]) -> CompletionGroup:
    return CompletionGroup(
        prompt=siblings[0].prompt,
        completions=tuple(chain.from_iterable(group.completions for group in siblings)),
        where=", ".join(group.where for group in siblings if group.where),
    )


def train_all_tokens(group: CompletionGroup) -> CompletionGroup:
    """The group with all its tokens trained: only the prompt's first token, which nothing stands before, stays prompt.

    The rest of it becomes the beginning of every completion, and nothing in a completion is masked.
    """
    completions = (
        replace(completion, tokens=np.concatenate([group.prompt[1:], completion.tokens]), mask=None)
        for completion in group.completions
    )
    return replace(group, prompt=group.prompt[:1], completions=tuple(completions))


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
