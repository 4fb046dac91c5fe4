"""What is sampled and kept, and what moves between rollouts: hand-made rollouts, and short runs gone on with."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trueup import rl
from trueup.objectives.policy_gradient import adapt_kl_leash, adapt_kl_penalty
from trueup.runs.checkpoint import load_state
from trueup.runs.folder import read_metrics
from trueup.trainers.policy import adapt, end_rollout
from trueup.trainers.rollouts import mini_batch

PROMPT = [3, 1]
SIGNAL, OTHER_SIGNAL = [[3, 2], [1, 3, 3]], [[2], [3, 3, 2]]
EQUAL, OTHER_EQUAL = [[3, 2], [3, 2]], [[1, 2], [1, 2]]


@pytest.fixture
def drawn(stage: Callable, new_group: Callable) -> Callable[..., Any]:
    """A dapo stage whose draws are written down, two prompts each."""

    def make(*draws: list, **settings: Any) -> Any:
        return stage("dapo", [[new_group(PROMPT, said, 3) for said in draw] for draw in draws], **settings)

    return make


def said(x: Any) -> list[list[list[int]]]:
    return [[list(c.tokens) for c in group.completions] for group in x.groups]


# --- dynamic sampling


def test_groups_without_signal_are_replaced_by_further_prompts(drawn: Callable):
    at = drawn([EQUAL, SIGNAL], [OTHER_SIGNAL, SIGNAL])
    x = at.rollout()
    assert said(x) == [SIGNAL, OTHER_SIGNAL]
    assert at.asked == [[0, 1], [2, 3]]
    assert at.metrics["num_prompts"] == at.moving.num_drawn == 4
    assert at.metrics["frac_reward_zero_std"] == 0
    assert x.advantages.abs().sum(-1).min() > 0


def test_a_rollout_makes_do_with_what_it_has(drawn: Callable):
    """One group with signal in all draws: that one alone, and the mini-batch that gets nothing moves nothing."""
    at = drawn([EQUAL, SIGNAL], [EQUAL, OTHER_EQUAL], max_draws=3, num_mini_batches=2)
    x = at.rollout()
    assert said(x) == [SIGNAL]
    assert at.moving.num_drawn == 6
    full, empty = (mini_batch(len(x.groups), at.settings, step) for step in (0, 1))
    assert (full, empty) == ([0], [])
    assert at.learn(x, full)[0].any()
    gradient, tally = at.learn(x, empty)
    assert not gradient.any()
    assert tally.loss == 0


def test_where_nothing_has_signal_the_last_draw_stays(drawn: Callable):
    at = drawn([EQUAL, EQUAL], [OTHER_EQUAL, EQUAL], max_draws=2)
    assert said(at.rollout()) == [OTHER_EQUAL, EQUAL]
    assert at.metrics["frac_reward_zero_std"] == 1


# --- what a critic says


def test_values_are_those_of_the_states(stage: Callable, new_group: Callable):
    """Before each token, and behind the last one: what the model's head says at the end of just so much text."""
    groups = [new_group(PROMPT, [tokens], 3) for tokens in ([3, 1, 3], [1, 2])]
    at = stage("ppo", groups, truncated_completions="bootstrapped", gae_lambda=1.0, whiten_advantages=False)
    x = at.rollout()
    model = at.players.critic.model

    def value(tokens: list[int]) -> float:
        with torch.no_grad():
            states = model.base_model(input_ids=torch.tensor([PROMPT + tokens]), use_cache=False).last_hidden_state
            return model.score(states[0, -1]).item()

    for row, tokens in enumerate(([3, 1, 3], [1, 2])):
        for t in range(len(tokens)):
            assert x.values[row, t].item() == pytest.approx(value(tokens[:t]), rel=1e-4, abs=1e-5)
        assert x.bootstrap[row].item() == pytest.approx(value(tokens), rel=1e-4, abs=1e-5)
    # At λ = 1 the critic is regressed on what was earned, and the one that was cut off would have earned more.
    expected = x.rewards.sum(-1, keepdim=True) - (x.rewards.cumsum(-1) - x.rewards)
    expected[0] += value([3, 1, 3])
    torch.testing.assert_close(x.returns, torch.where(x.mask, expected, 0.0), rtol=1e-4, atol=1e-5)


def test_nothing_is_learned_from_what_is_masked(stage: Callable, new_group: Callable):
    """Of completions that were cut off; the others are learned from as if those stood beside them, which they do."""
    groups = [new_group(PROMPT, [[3, 1, 3], [1, 2], [2]], 3)]
    at, plain = (stage("grpo", groups, kl_coef=0.0, truncated_completions=how) for how in ("masked", "terminal"))
    x, whole = at.rollout(), plain.rollout()
    assert torch.equal(x.advantages, whole.advantages)
    assert x.learned.sum(-1).tolist() == [0, 2, 1]
    gradient, tally = at.learn(x, [0])
    whole.advantages[0] = 0
    torch.testing.assert_close(gradient, plain.learn(whole, [0])[0], rtol=1e-4, atol=1e-7)
    assert tally.tokens == len(PROMPT) + 3


# --- between rollouts


def test_the_policy_becomes_the_reference_where_it_is_time(stage: Callable, new_group: Callable):
    at = stage("grpo", [new_group(PROMPT, SIGNAL, 3)], reference_every=2)
    before = at.players.reference.state_dict()["model.transformer.wte.weight"].clone()
    for number, taken in enumerate([False, True, False, True]):
        at.move(0.1)
        end_rollout(number, at.settings, at.players)
        now = at.players.reference.state_dict()["model.transformer.wte.weight"]
        assert torch.equal(now, at.players.scorer.state_dict()["model.transformer.wte.weight"]) == taken
        assert torch.equal(now, before) != taken
        before = now.clone()


def test_controllers(stage: Callable, new_group: Callable):
    at = stage("grpo", [new_group(PROMPT, SIGNAL, 3)], kl_coef=0.1, kl_target=2.0, penalty_target=0.01)
    adapt(at.settings, at.moving, {"objective/kl": 2.2, "approx_kl": 0.02})
    assert at.moving.kl_coef == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert at.moving.penalty_coef == 2
    adapt(at.settings, at.moving, {"objective/kl": 0.0, "approx_kl": 0.001})
    assert at.moving.kl_coef == pytest.approx(0.101 * (1 - 0.1 * 0.2))
    assert at.moving.penalty_coef == 1
    adapt(at.settings, at.moving, {})
    assert at.moving.penalty_coef == 1


def test_the_baseline_is_the_mean_of_earlier_rollouts(stage: Callable, new_group: Callable):
    at = stage("reinforce", [new_group(PROMPT, [[3, 2]], 3), new_group(PROMPT, [[2]], 3)], kl_coef=0.0)
    first = at.rollout()
    assert first.baseline == 0.37
    assert at.moving.num_earned == 7
    assert at.moving.baseline == pytest.approx((5 * 0.37 + first.scores.sum().item()) / 7)


# --- runs


def few_zeros(completions: list[str], **_: Any) -> list[float]:
    return [each.count("1") - each.count("0") - 0.1 * len(each) for each in completions]


def train(model: str, output: str, **settings: Any) -> list[dict[str, Any]]:
    defaults: dict[str, Any] = {
        "data": [{"prompt": f"{a}+{b}="} for a in range(3) for b in range(2)],
        "reward": few_zeros,
        "batch_size": 3,
        "max_new_tokens": 4,
        "dtype": "float32",
        "num_samples": 0,
        "save_every": 1,
        "keep_checkpoints": 99,
        "quiet": True,
    }
    rl(model=model, output=output, **(defaults | settings))
    return read_metrics(Path(output) / "metrics.jsonl")


def weights(output: str, step: int, of: str = "stepper") -> torch.Tensor:
    parameters = load_state(Path(output) / "checkpoints" / f"step-{step:06d}")[of]["parameters"]
    return torch.cat([parameter.flatten() for parameter in parameters.values()])


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "seconds" not in k and k != "tokens_per_second"} for line in lines]


def test_target_kl_leaves_the_rest_of_a_rollout_out(tiny_model: str, output: str, tmp_path: Path):
    """Nothing moves any more until the next rollout, the leash's turn comes all the same, and a run that is gone on
    with in the part that is left out does the same."""
    settings = {
        "recipe": "rloo",
        "inner_epochs": 4,
        "max_steps": 12,
        "learning_rate": 0.02,
        "kl_target": 0.5,
        "target_kl": 0.004,
    }
    lines = train(tiny_model, output, **settings)
    by_step = {line["step"]: line for line in lines}
    skipped = sorted(set(range(1, 13)) - set(by_step))
    assert skipped, by_step
    stops = [step for step in by_step if step + 1 in skipped]
    for step in stops:
        assert by_step[step]["approx_kl"] > 0.004
        end = 4 * math.ceil(step / 4)
        assert torch.equal(weights(output, step - 1), weights(output, end))
    moved = [step for step in by_step if step not in stops and step > 1]
    assert all(not torch.equal(weights(output, step - 1), weights(output, step)) for step in moved)
    for first in (5, 9):
        last = max(step for step in by_step if step < first)
        expected = adapt_kl_leash(by_step[last]["kl_coef"], by_step[last]["objective/kl"], 0.5)
        assert by_step[first]["kl_coef"] == pytest.approx(expected)
    for number in (stops[0], max(skipped)):
        again = str(tmp_path / f"from {number}")
        shutil.copytree(output, again)
        for step in range(number + 1, 13):
            shutil.rmtree(Path(again) / "checkpoints" / f"step-{step:06d}")
        assert timeless(train(tiny_model, again, resume="yes", **settings)) == timeless(lines)


def test_the_penalty_moves_after_every_rollout(tiny_model: str, output: str):
    lines = train(
        tiny_model,
        output,
        recipe="ppo_penalty",
        num_mini_batches=1,
        inner_epochs=2,
        max_steps=6,
        learning_rate=0.01,
        penalty_target=1e-3,
    )
    assert [line["penalty_coef"] for line in lines[:2]] == [1.0, 1.0]
    for before, after in ((lines[1], lines[2]), (lines[3], lines[4])):
        assert after["penalty_coef"] == adapt_kl_penalty(before["penalty_coef"], before["approx_kl"], 1e-3)
    assert lines[4]["penalty_coef"] != 1


def test_the_critic_warms_up_alone(tiny_model: str, output: str):
    lines = train(
        tiny_model, output, recipe="ppo", critic_warmup=1, num_mini_batches=1, inner_epochs=2, max_steps=4, batch_size=6
    )
    assert torch.equal(weights(output, 1), weights(output, 2))
    assert not torch.equal(weights(output, 2), weights(output, 3))
    for step in (1, 2, 3):
        assert not torch.equal(weights(output, step, "critic"), weights(output, step + 1, "critic"))
    assert all(line["critic_grad_norm"] > 0 for line in lines)
    assert all("approx_kl" not in line for line in lines[:2])
    assert lines[2]["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert lines[2]["skipped_steps"] == 0
