"""Gathering experience: T steps of every run's environments under a policy that doesn't change meanwhile.

Only actions are computed on the way, in NumPy; log-probs and values of a whole rollout are computed afterwards, in one
pass. Noise is drawn beforehand, from each run's own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trueup.control.environments import Environments, Step

Acting = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From scaled observations [S, N, D] and noise [S, N, O] to actions [S, N, A]."""
Scale = Callable[[np.ndarray], np.ndarray]
Noise = Callable[[int], np.ndarray]
"""Noise for so many steps, [T, S, N, O]."""

_BLOCK = 128
"""Steps that noise is drawn for at once where it isn't known when the episodes end."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """S runs × N environments × T steps; time stands last but for what each entry holds."""

    observations: Float[Tensor, "s n t1 d"]
    """As the policy saw them, T + 1 of them: the last one is what the rollout led to."""
    actions: Float[Tensor, "s n t a"]
    rewards: Float[Tensor, "s n t"]
    """As the environment gave them."""
    terminated: Bool[Tensor, "s n t"]
    truncated: Bool[Tensor, "s n t"]
    mask: Bool[Tensor, "s n t"] | None
    """False where a step was only a reset, or came after the only episode that counts; None: all are transitions."""
    final_places: tuple[Tensor, Tensor, Tensor]
    """Run, environment and time of the episodes that ended although the next observation is another episode's."""
    final_observations: Float[Tensor, "e d"]
    """What they ended with."""
    raw_observations: Float[Tensor, "s n t1 d"]
    """As the environment showed them."""

    @property
    def num_steps(self) -> int:
        """Steps of each run in its environments, which only reset in some."""
        return self.rewards[0].numel() if self.mask is None else int(self.mask.sum(dim=(1, 2)).max())

    @property
    def ended(self) -> Bool[Tensor, "s n t"]:
        return self.terminated | self.truncated

    def values_after(
        self, values: Float[Tensor, "s n t1"], final_values: Float[Tensor, " e"]
    ) -> Float[Tensor, "s n t"]:
        """V(s_{t+1}) of every step: of the state that it really led to, not of the next episode's first."""
        following = values[..., 1:].clone()
        following[self.final_places] = final_values
        return following


@dataclass
class Episodes:
    """Returns and lengths of episodes: of those that go on, and of those that ended since the last ``take``."""

    returns: np.ndarray
    """[S, N]"""
    lengths: np.ndarray
    ended: list[tuple[int, float, int]] = field(default_factory=list)
    """Run, return, length."""

    @classmethod
    def none(cls, num_runs: int, num_environments: int) -> Episodes:
        shape = num_runs, num_environments
        return cls(np.zeros(shape), np.zeros(shape, np.int64))

    def add(self, step: Step) -> None:
        transitions = 1 if step.is_reset is None else (~step.is_reset).reshape(self.lengths.shape)
        self.returns += step.rewards.reshape(self.returns.shape)
        self.lengths += transitions
        ended = step.terminated | step.truncated
        if ended.any():
            for row in np.flatnonzero(ended):
                place = divmod(int(row), self.returns.shape[1])
                self.ended.append((place[0], float(self.returns[place]), int(self.lengths[place])))
                self.returns[place] = self.lengths[place] = 0

    def take(self) -> list[tuple[int, float, int]]:
        ended, self.ended = self.ended, []
        return ended

    def state(self) -> dict[str, Any]:
        return {
            "returns": torch.from_numpy(self.returns.copy()),
            "lengths": torch.from_numpy(self.lengths.copy()),
            "ended": [list(episode) for episode in self.ended],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.returns, self.lengths = state["returns"].numpy(), state["lengths"].numpy()
        self.ended = [(run, total, length) for run, total, length in state["ended"]]


class Collector:
    """Steps the environments, and keeps what they showed last."""

    def __init__(self, environments: Environments, seeds: list[int], num_environments: int) -> None:
        self.environments, self.shape = environments, (len(seeds), num_environments)
        self.episodes = Episodes.none(*self.shape)
        # A run's environments have seeds of their own, far from those of any other run.
        self.seeds = [
            int(np.random.SeedSequence([seed, row]).generate_state(1)[0])
            for seed in seeds
            for row in range(num_environments)
        ]
        self.observations = np.zeros((*self.shape, environments.num_inputs), np.float32)

    def begin(self) -> None:
        self.observations = self.environments.reset(self.seeds).reshape(*self.shape, -1)

    def step(self, actions: np.ndarray, active: np.ndarray | None = None) -> Step:
        """One step of all environments, or of those that are ``active``: [R, A] → R rows."""
        step = self.environments.step(actions, active)
        self.episodes.add(step)
        self.observations = step.observations.reshape(*self.shape, -1)
        return step

    def gather(
        self, num_steps: int, act: Acting, scale: Scale, noise: Noise, *, whole_episodes: bool = False
    ) -> Rollout:
        """T = ``num_steps`` steps; or, with ``whole_episodes``, one episode in every environment, cut off at T steps.

        ``scale`` makes what the policy sees of what the environment shows.
        """
        runs, number = self.shape
        active = np.ones(runs * number, bool) if whole_episodes else None
        if whole_episodes and (self.episodes.lengths.any() or not self.environments.waits):
            self.begin_anew()
        raw, seen, actions, steps = [], [], [], []
        finals: list[tuple[int, int, np.ndarray]] = []  # row, time, what its episode ended with
        drawn = noise(num_steps if active is None else min(num_steps, _BLOCK))
        for time in range(num_steps):
            if time and time % len(drawn) == 0:
                drawn = noise(len(drawn))
            raw.append(self.observations)
            seen.append(scale(self.observations))
            actions.append(act(seen[-1], drawn[time % len(drawn)]))
            step = self.step(actions[-1].reshape(runs * number, -1), active)
            steps.append(step)
            finals += [(row, time, observation) for row, observation in step.final_observations.items()]
            if active is not None:
                active = active & ~(step.terminated | step.truncated)
                if not active.any():
                    break
        raw.append(self.observations)
        seen.append(scale(self.observations))

        def series(arrays: list[np.ndarray]) -> Tensor:
            """[T, S, N, …] (or [T, S·N]) with time behind the environments."""
            whole = np.stack(arrays)
            whole = whole.reshape(len(whole), runs, number, *whole.shape[3:])
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(whole, 0, 2)))

        truncated = series([step.truncated for step in steps])
        if active is not None and active.any():  # the horizon came first
            truncated[..., -1] |= torch.from_numpy(active.reshape(runs, number))
        mask = None
        if steps[0].is_reset is not None:
            mask = ~series([step.is_reset for step in steps])
        rows = np.array([row for row, _, _ in finals], np.int64)
        last = np.array([observation for _, _, observation in finals], np.float32)
        return Rollout(
            observations=series(seen),
            actions=series(actions).float(),
            rewards=series([step.rewards for step in steps]).float(),
            terminated=series([step.terminated for step in steps]),
            truncated=truncated,
            mask=mask,
            final_places=(
                torch.from_numpy(rows // number),
                torch.from_numpy(rows % number),
                torch.tensor([time for _, time, _ in finals], dtype=torch.long),
            ),
            final_observations=torch.from_numpy(self._scaled(scale, rows // number, last)),
            raw_observations=series(raw),
        )

    def begin_anew(self) -> None:
        """New episodes everywhere, other ones than before."""
        self.seeds = [int(np.random.SeedSequence(seed).generate_state(1)[0]) for seed in self.seeds]
        self.episodes = Episodes.none(*self.shape)
        self.begin()

    def _scaled(self, scale: Scale, runs: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Final observations as their runs' policies would have seen them: [E, D]."""
        if not len(last):
            return np.zeros((0, self.observations.shape[-1]), np.float32)
        of_all = scale(np.broadcast_to(last, (self.shape[0], *last.shape)))
        return of_all[runs, np.arange(len(last))]

    def state(self) -> dict[str, Any]:
        environments = self.environments.state()
        return {"environments": environments, "episodes": self.episodes.state(), "seeds": list(self.seeds)}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Go on where the state was taken; False if that can't be and new episodes begin."""
        self.seeds = list(state["seeds"])
        if state["environments"] is None:
            self.begin_anew()
            return False
        self.observations = self.environments.restore(state["environments"]).reshape(*self.shape, -1)
        self.episodes.restore(state["episodes"])
        return True
