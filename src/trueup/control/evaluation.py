"""Playing episodes with an agent that doesn't learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from trueup.control.agent import Agent
from trueup.control.environments import Environments

_AT_ONCE = 20
_LONGEST = 100_000


@dataclass(frozen=True)
class Outcome:
    """E episodes of each of S runs."""

    returns: Float[np.ndarray, "s e"]
    lengths: Int[np.ndarray, "s e"]


def evaluate(
    agent: Agent,
    make: Callable[[int], Environments],
    num_episodes: int,
    *,
    seed: int = 0,
    sample: bool = False,
    progress: Callable[[int], None] = lambda number: None,
) -> Outcome:
    """Returns and lengths of episodes, the same ones for every run of the agent: episode e begins with seed + e.

    The agent takes its best action, or with ``sample`` draws from its policy. Statistics of observations stay as they
    are. Each episode counts once, however short: a slot that is done waits for the others. ``make(rows)`` makes
    environments; ``progress`` is told of episodes that are done. Episodes longer than 100,000 steps are cut off.
    """
    runs = len(agent.seeds)
    returns, lengths = np.zeros((runs, num_episodes)), np.zeros((runs, num_episodes), np.int64)
    rng = np.random.default_rng(seed)
    for first in range(0, num_episodes, _AT_ONCE):
        episodes = np.arange(first, min(first + _AT_ONCE, num_episodes))
        shape = runs, len(episodes)
        environments = make(runs * len(episodes))
        try:
            observations = environments.reset(list(np.tile(seed + episodes, runs)))
            active = np.ones(runs * len(episodes), bool)
            for _ in range(_LONGEST):
                noise = agent.actions.noise(rng, shape) if sample else None
                actions = agent.act(agent.seen(observations.reshape(*shape, -1)), noise)
                step = environments.step(actions.reshape(len(active), -1), active)
                returns[:, episodes] += step.rewards.reshape(shape)
                lengths[:, episodes] += active.reshape(shape)
                ended = step.terminated | step.truncated
                progress(int(ended.sum()))
                active &= ~ended
                observations = step.observations
                if not active.any():
                    break
        finally:
            environments.close()
    return Outcome(returns, lengths)
