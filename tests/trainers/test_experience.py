"""A rollout as rows: laid out, cut into passes in any way, saved and read back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trueup.recipes import RECIPES
from trueup.records import Completion, CompletionGroup, StopReason
from trueup.rewards.calls import Reward
from trueup.rewards.rewards import Rewards
from trueup.rewards.samples import StepScores
from trueup.runs.checkpoint import load_latest, save_checkpoint
from trueup.trainers.experience import Experience, new_experience, passes, said_by, units

PROMPTS = ([3], [3, 1, 3], [1, 1])
SAID = (
    ([3, 2], [1, 3, 1, 3], [3, 3, 2]),
    ([2], [3, 1, 2], [0, 3, 3, 2]),
    ([3, 3, 3, 2], [1, 2], [3, 0, 3, 1]),
)
"""Completions of up to four tokens; those of four without the end token (2) were cut off."""


@pytest.fixture
def groups(new_group: Callable) -> list[CompletionGroup]:
    return [new_group(prompt, said, 4) for prompt, said in zip(PROMPTS, SAID, strict=True)]


def judged() -> Any:
    """A process reward model's stand-in: a reward that scores steps, each of two tokens."""

    def score(completion_ids: list[list[int]], **_: Any) -> StepScores:
        ends = [np.unique([*range(1, len(ids), 2), len(ids) - 1]) for ids in completion_ids]
        steps = [
            np.array([np.sin(3.0 * ids[end] + end + len(ids)) for end in each])
            for ids, each in zip(completion_ids, ends, strict=True)
        ]
        return StepScores(steps=steps, step_ends=ends, scores=[float(each.min()) for each in steps])

    return Rewards([Reward(name="judge", function=score, scores_steps=True)], None)


def make(stage: Callable, groups: list, recipe: str, **settings: Any) -> Any:
    filled = RECIPES[recipe].settings | {"group_size": 3, "batch_size": 3, "filter_groups": False}
    filled |= {"num_mini_batches": 1, "inner_epochs": 1, "success_score": 0.8}
    return stage(recipe, groups, rewards=judged() if recipe == "grpo_process" else None, **(filled | settings))


# --- rows


def test_rows_of_fresh_groups(groups: list[CompletionGroup]):
    scores = torch.arange(9.0).view(3, 3)
    x = new_experience(groups, scores, mask_truncated=True, device=torch.device("cpu"))
    assert x.mask.sum(-1).tolist() == [2, 4, 3, 1, 3, 4, 4, 2, 4]
    assert x.truncated.tolist() == [False, True, False, False, False, False, False, False, True]
    assert torch.equal(x.learned, x.mask & ~x.truncated[:, None])
    assert torch.equal(x.totals, scores)
    assert torch.equal(x.rewards[torch.arange(9), x.mask.sum(-1) - 1], scores.flatten())
    assert x.last.sum(-1).tolist() == [1] * 9
    assert x.old_logprobs.isnan().equal(x.mask)
    assert torch.equal(x.spread(scores).sum(-1), scores.flatten() * x.mask.sum(-1))
    unmasked = new_experience(groups, scores, mask_truncated=False, device=torch.device("cpu"))
    assert unmasked.learned.equal(x.mask)


def test_the_last_token_that_the_policy_wrote_is_rewarded():
    completion = Completion(tokens=np.array([3, 3, 1, 1]), mask=np.array([True, False, True, False]))
    x = new_experience(
        [CompletionGroup(prompt=np.array([1]), completions=(completion,))],
        torch.tensor([[2.0]]),
        mask_truncated=False,
        device=torch.device("cpu"),
    )
    assert x.rewards.tolist() == [[0.0, 0.0, 2.0, 0.0]]


@pytest.mark.parametrize("recipe", ["ppo", "grpo", "grpo_process"])
def test_a_saved_rollout_is_the_same_to_the_bit(recipe: str, stage: Callable, groups: list, tmp_path: Path):
    """Through a checkpoint's file, and what is learned from it too."""
    at = make(stage, groups, recipe, truncated_completions="masked")
    x = at.rollout()
    save_checkpoint(tmp_path, 1, save_model=lambda folder: None, state={"experience": x.state_dict()})
    found = load_latest(tmp_path)
    assert found is not None
    again = Experience.from_state(found[1]["experience"], torch.device("cpu"))
    for field in dataclasses.fields(Experience):
        before, after = getattr(x, field.name), getattr(again, field.name)
        if isinstance(before, Tensor):
            assert before.dtype == after.dtype
            assert torch.equal(before.nan_to_num(nan=9.0), after.nan_to_num(nan=9.0)), field.name
        elif field.name != "groups":
            assert before == after, field.name
    for before, after in zip(x.groups, again.groups, strict=True):
        assert before.prompt.tolist() == after.prompt.tolist()
        for one, other in zip(before.completions, after.completions, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.stop_reason is other.stop_reason
    first, second = at.learn(x, [2, 0]), at.learn(again, [2, 0])
    assert torch.equal(first[0], second[0])
    assert first[1].means() == second[1].means()


def test_masks_and_steps_survive_too(tmp_path: Path):
    completion = Completion(
        tokens=np.array([3, 3, 1]),
        mask=np.array([True, False, True]),
        step_ends=np.array([0, 2]),
        stop_reason=StopReason.STOP,
    )
    group = CompletionGroup(prompt=np.array([1, 3]), completions=(completion,), where="line 3")
    x = new_experience([group], torch.ones(1, 1), mask_truncated=False, device=torch.device("cpu"))
    (back,) = Experience.from_state(x.state_dict(), torch.device("cpu")).groups
    assert back.where == "line 3"
    for name in ("tokens", "mask", "step_ends"):
        assert getattr(back.completions[0], name).tolist() == getattr(completion, name).tolist()
    assert back.completions[0].stop_reason is StopReason.STOP


# --- passes


@pytest.mark.parametrize("tokens_per_batch", [1, 6, 8, 100])
def test_every_completion_is_in_one_pass(tokens_per_batch: int, stage: Callable, groups: list):
    x = make(stage, groups, "rloo").rollout()
    wanted = np.array([True, True, True, False, True, False, False, False, False])
    chosen = units(x, [1, 0, 2], wanted, tokens_per_batch)
    micros = list(passes(chosen, tokens_per_batch, torch.device("cpu")))
    assert sorted(torch.cat([micro.rows for micro in micros]).tolist()) == [0, 1, 2, 4]
    for micro in micros:
        assert len(micro.batch.tokens) <= tokens_per_batch or len(micro.rows) == 1
        said = [list(each.tokens) for group in micro.groups for each in group.completions]
        assert said == [list(SAID[row // 3][row % 3]) for row in micro.rows.tolist()]
        prompts = [list(group.prompt) for group in micro.groups for _ in group.completions]
        assert prompts == [list(PROMPTS[row // 3]) for row in micro.rows.tolist()]
    whole = said_by(lambda batch: batch.targets.float(), x, [0, 1], tokens_per_batch)
    for row in range(6):
        assert whole[row, : x.mask[row].sum()].tolist() == SAID[row // 3][row % 3]
    assert not whole[6:].any()


VARIANTS: dict[str, dict[str, Any]] = {
    "split": {"tokens_per_batch": 6},
    "one by one": {"tokens_per_batch": 1},
    "groups apart": {"tokens_per_batch": 13},
}
MORE: dict[str, dict[str, Any]] = {
    "rloo": {"truncated_completions": "masked"},
    "ppo": {"truncated_completions": "bootstrapped", "entropy_coef": 0.1},
    "reinforce++": {"kl_form": "prefix_k3"},
    "reinforce++-baseline": {"kl_form": "sequence_k2", "importance": "truncated"},
    "grpo": {"dual_clip": 3.0, "entropy_coef": 0.1},
    "dr_grpo": {"kl_form": "prefix_k1", "kl_coef": 0.1},
    "gspo": {"kl_form": "weighted_k3", "kl_coef": 0.1, "clip_low": 0.1, "clip_high": 0.1},
    "dapo": {"temperature": 0.7},
    "cispo": {"clip_high": 0.1, "truncated_completions": "masked"},
    "online_dpo": {"truncated_completions": "masked"},
}
"""So that every option is in one of the rows."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_how_a_step_is_cut_changes_nothing(recipe: str, stage: Callable, groups: list):
    """Micro-batches of any size, groups split over them, another order, rows padded instead of a tree: the same loss,
    the same gradients of policy and critic and the same metrics, off-policy as it is."""
    more = MORE.get(recipe, {})

    def step(groups: list, order: list[int], path: str = "tree", **changes: Any) -> tuple[Tensor, dict[str, float]]:
        at = make(stage, groups, recipe, **(more | changes))
        at.players.scorer.path = path
        x = at.rollout()
        old = said_by(at.players.old_logprobs, x, range(3), 100)
        x = dataclasses.replace(x, old_logprobs=old)
        at.move(0.05)
        gradient, tally = at.learn(x, order)
        if at.players.critic is not None:
            critic = [torch.zeros_like(p) if p.grad is None else p.grad for p in at.players.critic.parameters()]
            gradient = torch.cat([gradient, *(each.double().flatten() for each in critic)])
        return gradient, tally.means()

    gradient, means = step(groups, [0, 1, 2])
    assert gradient.norm() > 1e-4
    others = {name: step(groups, [0, 1, 2], **changes) for name, changes in VARIANTS.items()}
    others["order"] = step(groups, [2, 0, 1])
    others["padded"] = step(groups, [1, 0, 2], path="padded")
    others["other rollout"] = step([groups[1], groups[2], groups[0]], [0, 1, 2])
    for name, (other, other_means) in others.items():
        assert (other - gradient).norm() < 3e-5 * gradient.norm(), name
        assert other_means == pytest.approx(means, rel=2e-5, abs=2e-6), name


def test_completions_without_gradient_stay_out_and_are_counted(stage: Callable, new_group: Callable, groups: list):
    """A group of equal scores is not computed; the loss is divided as if it were."""
    equal = new_group([3], [[3, 2], [3, 2], [3, 2]], 4)
    at = make(stage, [*groups, equal], "rloo", batch_size=4, kl_coef=0.0)
    x = at.rollout()
    (gradient, tally), (alone, its) = at.learn(x, range(4)), at.learn(x, range(3))
    assert tally.tokens == its.tokens == sum(group.num_tokens for group in groups)
    torch.testing.assert_close(gradient, alone * 3 / 4, rtol=1e-5, atol=1e-6)
    nothing, none = at.learn(x, [3])
    assert not nothing.any()
    assert none.means() == {"loss": 0.0} | {f"clip_ratio/{name}_mean": 0.0 for name in ("low", "high", "region")}
    with_kl = make(stage, [*groups, equal], "rloo", batch_size=4, kl_coef=0.1, kl_form="sequence_k2")
    assert with_kl.learn(with_kl.rollout(), [3])[0].any()


def test_a_rollout_is_not_changed_by_a_look_at_it(stage: Callable, groups: list):
    """The old log-probs of the first mini-batch are the policy's own, and stay when it moves."""
    at = make(stage, groups, "grpo")
    x = at.rollout()
    assert x.old_logprobs[x.mask].isnan().all()
    truth = said_by(at.players.old_logprobs, x, range(3), 100)
    at.learn(copy.copy(x), [0, 1, 2])
    torch.testing.assert_close(x.old_logprobs, truth)
    at.move()
    _, tally = at.learn(x, [0, 1, 2])
    torch.testing.assert_close(x.old_logprobs, truth)
    assert tally.means()["approx_kl"] > 1e-3
