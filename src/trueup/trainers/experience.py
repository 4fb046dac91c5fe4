"""What a rollout has brought, as rows: one per completion, one column per token.

A rollout is N groups of K completions; a row is a completion, C = N·K of them in the order of the groups, T columns.
Whatever a model says about tokens is computed on the tree, micro-batch by micro-batch, and put into its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trueup.data.collate import micro_batches
from trueup.models.tree import TreeBatch, tree_batch
from trueup.records import Completion, CompletionGroup, StopReason


@dataclass(frozen=True, eq=False, kw_only=True)
class Experience:
    """One rollout. Tensors lie on the policy's device.

    ``scores``: float32 [N, K]. ``mask``: bool [C, T], the tokens that the policy wrote; ``learned``: those that take
    part in losses. ``truncated``: bool [C]. All other tensors: float32 [C, T], 0 outside of the mask. ``old_logprobs``
    are the trainer's before its first update on this rollout, NaN where nobody asked yet: there the policy has not
    moved, and they are its own. ``step_rewards``: what a process reward model gave, at the last token of each step
    (``step_mask``).
    """

    groups: tuple[CompletionGroup, ...]
    scores: Tensor
    mask: Tensor
    learned: Tensor
    truncated: Tensor
    sampler_logprobs: Tensor
    old_logprobs: Tensor
    rewards: Tensor
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    bootstrap: Tensor | None = None
    """float32 [C]: the critic's value of the state behind the last token."""
    step_rewards: Tensor | None = None
    step_mask: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    """What the critic is regressed on."""
    baseline: float = 0.0
    """Mean return of all completions of earlier rollouts."""

    @property
    def group_size(self) -> int:
        return self.scores.shape[1]

    @property
    def totals(self) -> Tensor:
        """What each completion earned in all, KL included where it is in the reward: [N, K]."""
        return self.rewards.sum(-1).view_as(self.scores)

    @property
    def last(self) -> Tensor:
        """bool [C, T]: the last token of each completion that the policy wrote."""
        return last_tokens(self.mask)

    def spread(self, per_completion: Tensor) -> Tensor:
        """A number per completion, [N, K], at each of its tokens: [C, T]."""
        return torch.where(self.mask, per_completion.reshape(-1, 1), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"groups": [_group_state(group) for group in self.groups]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Experience:
        """The rollout that ``state_dict`` was of."""
        groups = tuple(map(_group_from, state["groups"]))
        others: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in state.items()
            if name != "groups"
        }
        return cls(groups=groups, **others)


def new_experience(
    groups: Sequence[CompletionGroup], scores: Tensor, *, mask_truncated: bool, device: torch.device
) -> Experience:
    """Rows for freshly sampled groups of one size, with the score of each completion as the reward of its last token.

    ``mask_truncated``: nothing is learned from completions that were cut off; they still count as completions.
    """
    completions = [completion for group in groups for completion in group.completions]
    length = max(len(completion.tokens) for completion in completions)
    mask = torch.zeros(len(completions), length, dtype=torch.bool)
    sampler = torch.zeros(len(completions), length)
    for row, completion in enumerate(completions):
        mask[row, : len(completion.tokens)] = torch.from_numpy(completion.completion_mask)
        if completion.sampler_logprobs is not None:
            sampler[row, : len(completion.tokens)] = torch.from_numpy(completion.sampler_logprobs)
    truncated = torch.tensor([completion.truncated for completion in completions])
    learned = mask & ~truncated[:, None] if mask_truncated else mask
    rewards = torch.where(last_tokens(mask), scores.cpu().float().reshape(-1, 1), 0.0)
    rows: dict[str, Any] = {"mask": mask, "learned": learned, "truncated": truncated, "rewards": rewards}
    rows |= {"sampler_logprobs": sampler * mask, "old_logprobs": torch.where(mask, torch.nan, 0.0)}
    return Experience(
        groups=tuple(groups), scores=scores.float().to(device), **{name: rows[name].to(device) for name in rows}
    )


def last_tokens(mask: Tensor) -> Tensor:
    """bool [C, T]: the last True of each row; of a row without one, none."""
    count = mask.cumsum(-1)
    return mask & (count == count[:, -1:])


def first_tokens(mask: Tensor) -> Tensor:
    """bool [C, T]: the first True of each row; of a row without one, none."""
    return mask & (mask.cumsum(-1) == 1)


class Unit(NamedTuple):
    """What goes through a model together: a prompt with some of its completions, and the rows that they have."""

    group: CompletionGroup
    rows: np.ndarray


def units(experience: Experience, groups: Sequence[int], wanted: np.ndarray, tokens_per_batch: int) -> list[Unit]:
    """The wanted completions of these groups, each behind its prompt. ``wanted``: bool [C].

    A group that is too large for a micro-batch is split, its prompt repeated: what is computed per token, or summed
    over tokens, does not change.
    """
    found = []
    for number in groups:
        group, first = experience.groups[number], number * experience.group_size
        chosen = [index for index in range(len(group.completions)) if wanted[first + index]]
        for part in _parts(group, chosen, tokens_per_batch):
            completions = tuple(group.completions[index] for index in part)
            found.append(Unit(replace(group, completions=completions), first + np.array(part)))
    return found


def _parts(group: CompletionGroup, chosen: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    part: list[int] = []
    room = 0
    for index in chosen:
        length = len(group.completions[index].tokens)
        if part and length > room:
            yield part
            part = []
        if not part:
            room = tokens_per_batch - len(group.prompt)
        part.append(index)
        room -= length
    if part:
        yield part


class Micro(NamedTuple):
    """One pass: the units' groups, their tree batch, and their rows in the experience, in the order of the batch."""

    groups: list[CompletionGroup]
    batch: TreeBatch
    rows: Tensor


def passes(chosen: Sequence[Unit], tokens_per_batch: int, device: torch.device) -> Iterator[Micro]:
    """The units, cut into micro-batches."""
    for micro in micro_batches([unit.group for unit in chosen], tokens_per_batch):
        groups = [chosen[index].group for index in micro]
        rows = np.concatenate([chosen[index].rows for index in micro])
        yield Micro(groups, tree_batch(groups, device), torch.from_numpy(rows).to(device))


@torch.no_grad()
def put_rows(target: Tensor, micro: Micro, flat: Tensor) -> None:
    """Write what a model said about the scored tokens of a micro-batch, [S], into its rows of ``target``, [C, T]."""
    rows = micro.batch.rows(flat.float())
    target[micro.rows, : rows.shape[1]] = rows


@torch.no_grad()
def said_by(
    forward: Callable[[TreeBatch], Tensor],
    x: Experience,
    groups: Sequence[int],
    tokens_per_batch: int,
    elsewhere: Tensor | None = None,
) -> Tensor:
    """What a model says about each token of these groups, [C, T]; for the others what ``elsewhere`` has, or 0."""
    said = torch.zeros_like(x.rewards) if elsewhere is None else elsewhere.clone()
    everything = np.ones(len(said), dtype=bool)
    for micro in passes(units(x, groups, everything, tokens_per_batch), tokens_per_batch, said.device):
        put_rows(said, micro, forward(micro.batch))
    return said


def put_steps(x: Experience, steps: Sequence[np.ndarray], step_ends: Sequence[np.ndarray]) -> Experience:
    """The rollout with the rewards of its completions' steps, each at the last token of its step.

    ``steps``: of each completion float64 [M], ``step_ends``: int64 [M].
    """
    rewards, mask = np.zeros(x.mask.shape, dtype=np.float32), np.zeros(x.mask.shape, dtype=bool)
    for row, (scores, ends) in enumerate(zip(steps, step_ends, strict=True)):
        rewards[row, ends], mask[row, ends] = scores, True
    return replace(
        x, step_rewards=torch.from_numpy(rewards).to(x.mask.device), step_mask=torch.from_numpy(mask).to(x.mask.device)
    )


def _group_state(group: CompletionGroup) -> dict[str, Any]:
    def tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array))

    completions = [
        {name: tensor(getattr(completion, name)) for name in ("tokens", "mask", "step_ends")}
        | {"stop_reason": str(completion.stop_reason)}
        for completion in group.completions
    ]
    return {"prompt": tensor(group.prompt), "completions": completions, "where": group.where}


def _group_from(state: Mapping[str, Any]) -> CompletionGroup:
    def array(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.numpy()

    completions = (
        Completion(
            **{
                name: each[name] if each[name] is None else each[name].numpy()
                for name in ("tokens", "mask", "step_ends")
            },
            stop_reason=StopReason(each["stop_reason"]),
        )
        for each in state["completions"]
    )
    return CompletionGroup(prompt=state["prompt"].numpy(), completions=tuple(completions), where=state["where"])
