"""Small environments whose every number is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from trueup.mdp import TabularMDP
from trueup.mdp.sampling import Sampler


class Counter(gym.Env):
    """Shows how many steps were taken; step t earns 10·(t + 1) plus the action; ends after ``length`` steps."""

    observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int, *, truncates: bool = False) -> None:
        self.length, self.truncates = length, truncates

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        ended = self.time >= self.length
        reward = 10.0 * self.time + float(action)
        return (
            np.full(1, self.time, np.float32),
            reward,
            ended and not self.truncates,
            ended and self.truncates,
            {},
        )


class Process(gym.Env):
    """A tabular process, drawn from with the environment's own generator; shows its state."""

    def __init__(self, mdp: TabularMDP) -> None:
        self.mdp = mdp
        self.observation_space = gym.spaces.Discrete(mdp.num_states)
        self.action_space = gym.spaces.Discrete(mdp.num_actions)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.state = int(self.np_random.choice(self.mdp.num_states, p=self.mdp.start))
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        taken = Sampler(self.mdp, self.np_random).steps(np.array([self.state]), np.array([action]))
        self.state = int(taken.next_states[0])
        return self.state, float(taken.rewards[0]), bool(taken.terminated[0]), False, {}


@pytest.fixture
def counter() -> Callable[..., Callable[[], Counter]]:
    """Makes what makes counters."""
    return lambda length, **options: lambda: Counter(length, **options)


@pytest.fixture
def process() -> Callable[[TabularMDP], Callable[[], Process]]:
    """Makes what makes environments of a tabular process."""
    return lambda mdp: lambda: Process(mdp)
