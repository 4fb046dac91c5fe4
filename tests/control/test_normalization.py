"""Running statistics against those of all that was seen, computed at once; discounted sums by a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from trueup.control.agent import Agent
from trueup.control.normalization import ObservationScale, RewardScale
from trueup.control.presets import ALGORITHMS
from trueup.control.settings import ControlSettings
from trueup.control.train import train

RUNS, NUMBER = 3, 2


def observed(sizes: tuple[int, ...] = (4, 1, 7), inputs: int = 3, seed: int = 0) -> list[Tensor]:
    """Rollouts of several lengths, as float32; every run and every input with a mean and spread of its own."""
    rng = np.random.default_rng(seed)
    means, spreads = 10 * rng.standard_normal((RUNS, 1, inputs)), rng.uniform(0.1, 5, (RUNS, 1, inputs))
    return [torch.from_numpy(means + spreads * rng.standard_normal((RUNS, size, inputs))).float() for size in sizes]


def test_observation_scale_golden() -> None:
    """Seen: 1 and 3, of mean 2 and spread 1. Then 6 as well: mean 10/3, variance 46/3 − 100/9 = 38/9."""
    scale = ObservationScale(1, 1, clip=2.5)
    scale.fold(torch.tensor([[[1.0], [3.0]]]))
    assert scale(np.array([[[4.0], [2.0], [5.0], [-5.0]]], np.float32)).ravel().tolist() == [2, 0, 2.5, -2.5]
    scale.fold(torch.tensor([[[6.0]]]))
    expected = (6 - 10 / 3) / np.sqrt(38 / 9)
    assert scale(np.array([[[6.0]]], np.float32)).item() == pytest.approx(expected, rel=1e-6)


def test_observation_statistics_are_those_of_everything_seen() -> None:
    scale = ObservationScale(RUNS, 3, clip=10.0)
    rollouts = observed()
    for rollout in rollouts:
        scale.fold(rollout)
    everything = torch.cat(rollouts, 1).double()
    for run in range(RUNS):
        assert (scale.statistics.count[run] == everything.shape[1]).all()
        torch.testing.assert_close(scale.statistics.mean[run, 0], everything[run].mean(0), rtol=1e-12, atol=0)
        variance = everything[run].var(0, correction=0)
        torch.testing.assert_close(scale.statistics.variance[run, 0], variance, rtol=1e-12, atol=0)
    scaled = scale(everything.float().numpy())
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(1), 1, atol=1e-5)


def test_a_runs_scale_is_its_own() -> None:
    together, alone = ObservationScale(RUNS, 3, clip=10.0), ObservationScale(1, 3, clip=10.0)
    for rollout in observed():
        together.fold(rollout)
        alone.fold(rollout[1:2])
    seen = observed(seed=1)[0].numpy()
    np.testing.assert_allclose(together(seen)[1:2], alone(seen[1:2]), rtol=1e-6)


def test_before_anything_is_seen_observations_stay_as_they_are() -> None:
    scale = ObservationScale(1, 2, clip=10.0)
    seen = np.array([[[1.0, -2.0], [30.0, -30.0]]], np.float32)
    np.testing.assert_allclose(scale(seen), [[[1, -2], [10, -10]]], rtol=1e-7)
    assert seen[0, 1].tolist() == [30, -30]  # what was shown isn't changed


def test_what_never_changes_is_scaled_to_0() -> None:
    """In float32, where ten times 0.1 doesn't add up to 1: without rounding there is no spread, and no 1e4."""
    scale = ObservationScale(1, 1, clip=10.0)
    for _ in range(3):
        scale.fold(torch.full((1, 10, 1), 0.1))
    assert np.abs(scale(np.full((1, 1, 1), 0.1, np.float32))).max() < 1e-6


def test_observation_scale_restored_goes_on_as_if_never_stopped() -> None:
    first, *rest = observed()
    scale, other = ObservationScale(RUNS, 3, clip=2.0), ObservationScale(RUNS, 3, clip=2.0)
    scale.fold(first)
    other.restore(scale.state())
    seen = observed(seed=1)[2].numpy()
    np.testing.assert_array_equal(other(seen), scale(seen))
    kept = {name: tensor.clone() for name, tensor in scale.state().items()}
    state = scale.state()
    for rollout in rest:
        scale.fold(rollout)
        other.fold(rollout)
    np.testing.assert_array_equal(other(seen), scale(seen))
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())  # a state isn't changed afterwards


def test_observations_of_no_transition_are_not_counted() -> None:
    """A row that waits for the others to end shows the same again and again; some runs wait more than others."""
    seen, mask = observed((20,))[0], torch.rand((RUNS, 20), generator=torch.Generator().manual_seed(0)) < 0.5
    mask[2] = False
    waiting = torch.where(mask.unsqueeze(-1), seen, 1e3)
    scale = ObservationScale(RUNS, 3, clip=10.0)
    scale.fold(waiting, mask)
    for run in (0, 1):
        scored = seen[run][mask[run]].double()
        assert (scale.statistics.count[run] == len(scored)).all()
        torch.testing.assert_close(scale.statistics.mean[run, 0], scored.mean(0), rtol=1e-12, atol=0)
        variance = scored.var(0, correction=0)
        torch.testing.assert_close(scale.statistics.variance[run, 0], variance, rtol=1e-12, atol=0)
    assert [each[2].tolist() for each in scale.statistics] == [[[0] * 3], [[0] * 3], [[1] * 3]]  # as at the beginning


def rewarded(steps: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards, each run's of its own size, and which steps end an episode."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.1, 1.0, 30.0]).view(RUNS, 1, 1)
    rewards = sizes * (0.5 + torch.randn((RUNS, NUMBER, steps), generator=generator))
    return rewards, torch.rand((RUNS, NUMBER, steps), generator=generator) < 0.25


def sums_by_loop(rollouts: list[tuple[Tensor, Tensor]], gamma: float) -> list[np.ndarray]:
    """G of every step of every rollout, in float64."""
    running = np.zeros((RUNS, NUMBER))
    sums = []
    for rewards, ended in rollouts:
        of_rollout = np.zeros(rewards.shape)
        for time in range(rewards.shape[-1]):
            running = gamma * running + rewards[..., time].double().numpy()
            of_rollout[..., time] = running
            running = np.where(ended[..., time].numpy(), 0.0, running)
        sums.append(of_rollout)
    return sums


def test_reward_scale_golden() -> None:
    """γ = ½; G = 4, 4 and, after the end, 4 anew; in the next rollout ½·4 + 2 = 4, then ½·4 + 10 = 12.

    Of one rollout G has no variance, so rewards are divided by √1e-8 and clipped; of both it is
    (4·16 + 144)/5 − (28/5)² = 10.24, whose root is 3.2.
    """
    scale = RewardScale(1, 1, gamma=0.5, clip=3.0)
    no, yes = False, True
    first = scale(torch.tensor([[[4.0, 2.0, 4.0]]]), torch.tensor([[[no, yes, no]]]))
    assert first.tolist() == [[[3, 3, 3]]]
    second = scale(torch.tensor([[[2.0, 10.0]]]), torch.tensor([[[no, no]]]))
    torch.testing.assert_close(second, torch.tensor([[[2 / 3.2, 3.0]]]))
    assert scale.running.item() == 12
    assert scale.statistics.count.item() == 5


def test_steps_that_are_no_transitions_are_not_counted() -> None:
    """Behind the end of an episode a step earns nothing, be it one reset or a wait for the others."""
    no, yes = False, True
    rewards = torch.tensor([[[4.0, 2.0, 0.0, 0.0], [1.0, 0.0, 5.0, 2.0]]])
    ended = torch.tensor([[[no, yes, no, no], [yes, no, no, no]]])
    mask = torch.tensor([[[yes, yes, no, no], [yes, no, yes, yes]]])
    scale = RewardScale(1, 2, gamma=0.5, clip=100.0)
    scaled = scale(rewards, ended, mask)
    sums = np.array([4, 4, 1, 5, 4.5])
    assert scale.statistics.count.item() == 5
    assert scale.statistics.variance.item() == pytest.approx(sums.var())
    np.testing.assert_allclose(scaled, rewards / sums.std(), rtol=1e-6)
    assert scale.running.tolist() == [[0, 4.5]]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_rewards_are_divided_by_the_spread_of_discounted_sums(gamma: float) -> None:
    """Of every run's own, over all rollouts so far, the current one among them: the first by its own alone."""
    rollouts = [rewarded(steps, seed) for seed, steps in enumerate((9, 1, 4, 16))]
    scale = RewardScale(RUNS, NUMBER, gamma, clip=1e6)
    sums = sums_by_loop(rollouts, gamma)
    for number, (rewards, ended) in enumerate(rollouts, 1):
        scaled = scale(rewards, ended)
        assert scaled.dtype == rewards.dtype
        so_far = np.concatenate([each.reshape(RUNS, -1) for each in sums[:number]], 1)
        np.testing.assert_allclose(scale.statistics.mean[:, 0], so_far.mean(1), rtol=1e-10)
        np.testing.assert_allclose(scale.statistics.variance[:, 0], so_far.var(1), rtol=1e-10)
        expected = rewards.double().numpy() / np.sqrt(so_far.var(1) + 1e-8)[:, None, None]
        np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_an_episode_goes_on_from_one_rollout_to_the_next() -> None:
    """However its steps are cut into rollouts, the statistics are the same; an end on the last step is an end too."""
    rewards, ended = rewarded(12)
    ended[..., 3], ended[..., 7] = True, False
    whole, cut = RewardScale(RUNS, NUMBER, 0.9, 10.0), RewardScale(RUNS, NUMBER, 0.9, 10.0)
    whole(rewards, ended)
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        cut(rewards[..., part], ended[..., part])
    for one, other in zip(cut.statistics, whole.statistics, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    torch.testing.assert_close(cut.running, whole.running)


def test_the_mean_of_rewards_stays() -> None:
    """All of a run's rewards are divided by one number: signs and proportions stay, and rewards of 1 don't become 0."""
    rewards, ended = rewarded()
    scaled = RewardScale(RUNS, NUMBER, 0.99, clip=1e6)(rewards, ended)
    assert torch.equal(scaled.sign(), rewards.sign())
    ratios = (scaled / rewards).flatten(1)
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios))
    ones = torch.ones(1, 1, 50)
    assert (RewardScale(1, 1, 0.99, clip=10.0)(ones, ones < 0) > 0).all()


def test_the_rewards_of_the_rollout_stay_as_they_are() -> None:
    rewards, ended = rewarded()
    for given in (rewards, rewards.double()):
        kept = given.clone()
        scale = RewardScale(RUNS, NUMBER, 0.9, 10.0)
        scale(given, ended)
        scale(given, ended)
        assert torch.equal(given, kept)


def test_rewards_are_clipped_after_scaling() -> None:
    rewards, ended = rewarded()
    free, clipped = (RewardScale(RUNS, NUMBER, 0.9, clip)(rewards, ended) for clip in (1e6, 0.5))
    assert torch.equal(clipped, free.clamp(-0.5, 0.5))
    assert (clipped.abs() == 0.5).any()
    assert (clipped.abs() < 0.5).any()


def test_scaling_without_folding_changes_nothing() -> None:
    scale = RewardScale(RUNS, NUMBER, 0.9, clip=1e6)
    rewards, ended = rewarded()
    first = scale(rewards, ended)
    running, statistics = scale.running.clone(), [each.clone() for each in scale.statistics]
    assert torch.equal(scale(rewards, ended, fold=False), first)
    scale(3 * rewards, ended, fold=False)
    assert torch.equal(scale.running, running)
    assert all(torch.equal(one, other) for one, other in zip(scale.statistics, statistics, strict=True))


def test_reward_scale_restored_goes_on_as_if_never_stopped() -> None:
    scale, other = RewardScale(RUNS, NUMBER, 0.9, 10.0), RewardScale(RUNS, NUMBER, 0.9, 10.0)
    scale(*rewarded())
    state = scale.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    other.restore(state)
    for seed in (1, 2):
        assert torch.equal(scale(*rewarded(seed=seed)), other(*rewarded(seed=seed)))
    for one, expected in zip(other.state().values(), scale.state().values(), strict=True):
        assert torch.equal(one, expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


class Wanders(gymnasium.Env):
    """Episodes of one to twelve steps, whatever is done; what is seen, and earned, is how many they have been."""

    observation_space = gymnasium.spaces.Box(0, 20, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self) -> None:
        self.acted_on: list[float] = []
        """Every observation that an action followed."""

    def reset(self, **given: Any) -> tuple[np.ndarray, dict]:
        super().reset(**given)
        self.time, self.length = 0, int(self.np_random.integers(1, 13))
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.acted_on.append(self.time)
        self.time += 1
        return np.full(1, self.time, np.float32), float(self.time), self.time >= self.length, False, {}


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_an_agents_statistics_are_those_of_the_steps_that_it_took(algorithm: str, tmp_path: Path) -> None:
    """Of whole episodes too, where an environment waits until the others have ended theirs."""
    made: list[Wanders] = []

    def make() -> Wanders:
        made.append(Wanders())
        return made[-1]

    settings = ControlSettings(
        **{
            **ALGORITHMS[algorithm],
            "env": "Wanders-v0",
            "algorithm": algorithm,
            "output": str(tmp_path / "run"),
            "seeds": (0, 1),
            "num_envs": 3,
            "total_steps": 200,
            "rollout_steps": 16,
            "eval_episodes": 0,
            "normalize_observations": True,
            "normalize_rewards": True,
            "quiet": True,
        }
    )
    scale = Agent.load(train(settings, make=make).agent_folder).scale
    assert scale is not None
    for run in (0, 1):
        seen = np.concatenate([each.acted_on for each in made[3 * run : 3 * run + 3]])
        assert scale.statistics.count[run].item() == len(seen) >= 100
        assert scale.statistics.mean[run].item() == pytest.approx(seen.mean())
        assert scale.statistics.variance[run].item() == pytest.approx(seen.var())
