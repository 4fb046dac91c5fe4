"""Rollouts: every entry of small ones by hand, in each way of stepping."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from trueup.control.environments import Environments, LocalEnvironments, VectorEnvironments
from trueup.control.rollout import Collector
from trueup.objectives.advantages import gae
from trueup.objectives.returns import discounts_from


def rows_of(make: Any, num_rows: int, way: str) -> Environments:
    if way == "local":
        return LocalEnvironments(make, num_rows)
    mode = AutoresetMode.SAME_STEP if way == "same step" else AutoresetMode.NEXT_STEP
    return VectorEnvironments(SyncVectorEnv([make] * num_rows, autoreset_mode=mode))


def act_by_noise(seen: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return noise


def plain(seen: np.ndarray) -> np.ndarray:
    return seen


def zeros(shape: tuple[int, ...]) -> Any:
    return lambda num_steps: np.zeros((num_steps, *shape, 1), np.int64)


@pytest.mark.parametrize("way", ["local", "same step"])
@pytest.mark.parametrize("truncates", [False, True])
def test_golden(counter: Any, way: str, truncates: bool) -> None:
    collector = Collector(rows_of(counter(3, truncates=truncates), 1, way), [0], 1)
    collector.begin()
    rollout = collector.gather(5, act_by_noise, lambda seen: seen / 2, zeros((1, 1)))
    assert rollout.observations.flatten().tolist() == [0, 0.5, 1, 0, 0.5, 1]
    assert rollout.raw_observations.flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert rollout.rewards.flatten().tolist() == [10, 20, 30, 10, 20]
    assert rollout.terminated.flatten().tolist() == [False, False, not truncates, False, False]
    assert rollout.truncated.flatten().tolist() == [False, False, truncates, False, False]
    assert rollout.mask is None
    assert [place.tolist() for place in rollout.final_places] == [[0], [0], [2]]
    assert rollout.final_observations.tolist() == [[1.5]]  # as the policy would have seen it
    assert rollout.num_steps == 5
    # With the observation as the value of a state: what step 2 led to is 3 and not the next episode's 0.
    following = rollout.values_after(rollout.observations.squeeze(-1), rollout.final_observations.squeeze(-1))
    assert following.flatten().tolist() == [0.5, 1, 1.5, 0.5, 1]


def test_a_reset_step_is_masked(counter: Any) -> None:
    collector = Collector(rows_of(counter(2), 1, "next step"), [0], 1)
    collector.begin()
    rollout = collector.gather(5, act_by_noise, plain, zeros((1, 1)))
    assert rollout.raw_observations.flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert rollout.mask is not None
    assert rollout.mask.flatten().tolist() == [True, True, False, True, True]
    assert rollout.rewards.flatten().tolist() == [10, 20, 0, 10, 20]
    assert rollout.terminated.flatten().tolist() == [False, True, False, False, True]
    assert rollout.num_steps == 4
    following = rollout.values_after(rollout.observations.squeeze(-1), rollout.final_observations.squeeze(-1))
    assert following.flatten().tolist() == [1, 2, 0, 1, 2]


@pytest.mark.parametrize("truncates", [False, True])
def test_advantages_do_not_depend_on_how_environments_are_stepped(counter: Any, truncates: bool) -> None:
    """The same transitions, with a reset step between episodes or without one."""

    def advantages(way: str, num_steps: int) -> list[float]:
        collector = Collector(rows_of(counter(3, truncates=truncates), 1, way), [0], 1)
        collector.begin()
        rollout = collector.gather(num_steps, act_by_noise, plain, zeros((1, 1)))
        values = rollout.observations.squeeze(-1).double() ** 2
        found = gae(
            rollout.rewards.double(),
            discounts_from(rollout.terminated, 0.9, dtype=torch.float64),
            values[..., :-1],
            rollout.values_after(values, rollout.final_observations.squeeze(-1).double() ** 2),
            gae_lambda=0.8,
            truncated=rollout.ended,
            mask=rollout.mask,
        )
        kept = torch.ones_like(rollout.terminated) if rollout.mask is None else rollout.mask
        return found[kept].tolist()

    expected = advantages("local", 9)
    assert advantages("same step", 9) == pytest.approx(expected)
    assert advantages("next step", 11) == pytest.approx(expected)  # two of them reset
    # By hand, the last step of an episode: 30 + 0.9·9·[truncated] − 4
    assert expected[2] == pytest.approx(30 - 4 + (0.9 * 9 if truncates else 0))


@pytest.mark.parametrize("way", ["local", "same step", "next step"])
def test_whole_episodes(counter: Any, way: str) -> None:
    """Two environments of which one ends early: it waits for the other."""
    lengths = iter([2, 4, 2, 4, 2, 4])

    def make() -> gym.Env:
        return counter(next(lengths))()

    collector = Collector(rows_of(make, 2, way), [0], 2)
    collector.begin()
    for _ in range(2):  # the second time begins new episodes
        rollout = collector.gather(50, act_by_noise, plain, zeros((1, 2)), whole_episodes=True)
        assert rollout.mask is not None
        assert rollout.mask[0].tolist() == [[True, True, False, False], [True] * 4]
        assert rollout.rewards[0].tolist() == [[10, 20, 0, 0], [10, 20, 30, 40]]
        assert rollout.terminated[0].tolist() == [[False, True, False, False], [False, False, False, True]]
        assert not rollout.truncated.any()
        assert rollout.num_steps == 6
        assert sorted(collector.episodes.take()) == [(0, 30.0, 2), (0, 100.0, 4)]


def test_an_episode_that_is_too_long_is_truncated(counter: Any) -> None:
    collector = Collector(LocalEnvironments(counter(9), 1), [0], 1)
    collector.begin()
    for _ in range(2):
        rollout = collector.gather(3, act_by_noise, plain, zeros((1, 1)), whole_episodes=True)
        assert rollout.rewards.flatten().tolist() == [10, 20, 30]
        assert rollout.truncated.flatten().tolist() == [False, False, True]
        following = rollout.values_after(rollout.observations.squeeze(-1), rollout.final_observations.squeeze(-1))
        assert following.flatten().tolist() == [1, 2, 3]


def test_episodes_are_counted_across_rollouts(counter: Any) -> None:
    collector = Collector(LocalEnvironments(counter(3), 4), [0, 1], 2)
    collector.begin()
    collector.gather(2, act_by_noise, plain, zeros((2, 2)))
    assert collector.episodes.take() == []
    collector.gather(2, act_by_noise, plain, zeros((2, 2)))
    assert collector.episodes.take() == [(0, 60.0, 3), (0, 60.0, 3), (1, 60.0, 3), (1, 60.0, 3)]
    assert collector.episodes.take() == []


def test_runs_see_their_own_numbers() -> None:
    """A run's environments and their seeds are the same whatever stands beside it."""

    def first(seeds: list[int]) -> np.ndarray:
        rows = LocalEnvironments(lambda: gym.make("CartPole-v1"), 2 * len(seeds))
        collector = Collector(rows, seeds, 2)
        collector.begin()
        return collector.observations

    both, alone = first([3, 8]), first([8])
    assert np.array_equal(both[1:], alone)
    assert not np.array_equal(both[0], both[1])
    assert not np.array_equal(alone[0, 0], alone[0, 1])


def test_final_observations_are_scaled_by_their_own_run(counter: Any) -> None:
    factors = np.array([1, 10], np.float32)[:, None, None]
    collector = Collector(LocalEnvironments(counter(2), 2), [0, 1], 1)
    collector.begin()
    rollout = collector.gather(2, act_by_noise, lambda seen: seen * factors, zeros((2, 1)))
    assert rollout.final_observations.flatten().tolist() == [2, 20]
