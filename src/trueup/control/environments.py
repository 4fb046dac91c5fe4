"""Environments, many at a time: R rows that are stepped together, N for each run.

Gymnasium's vector environments begin the next episode in one of two ways, and the learner has to know which:

- *same step*: the step that ends an episode returns the first observation of the next one, and the last observation of
  the old one beside it.
- *next step*: it returns the last observation; the step after it ignores its action and only resets. That step is no
  transition (``Step.is_reset``).

What ended an episode is kept in two masks. ``terminated``: there is nothing more to earn. ``truncated``: a time limit
cut it, and the value of the state that was left still counts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from trueup.control.actions import ActionSpace, action_space
from trueup.errors import CheckpointError, DataError, require_extra

Vectorization = Literal["local", "async", "gymnasium", "envpool"]


@dataclass(slots=True)
class Step:
    """What one step of R environments brought."""

    observations: np.ndarray
    """To act on next, float32 [R, D]."""
    rewards: np.ndarray
    """[R]"""
    terminated: np.ndarray
    """bool [R]"""
    truncated: np.ndarray
    """bool [R]; False where terminated."""
    final_observations: dict[int, np.ndarray] = field(default_factory=dict)
    """Of rows whose episode ended and whose next one has begun already: what the old one ended with."""
    is_reset: np.ndarray | None = None
    """bool [R]: the step was no transition (it only reset, or the row wasn't ``active``); None: there are none."""


class Environments(Protocol):
    num_rows: int
    num_inputs: int
    """Numbers in an observation."""
    actions: ActionSpace
    waits: bool
    """Whether a row that isn't active stays where it is, at the start of its next episode."""

    def reset(self, seeds: Sequence[int]) -> np.ndarray: ...

    def step(self, actions: np.ndarray, active: np.ndarray | None = None) -> Step: ...

    def state(self) -> dict[str, Any] | None: ...

    def restore(self, state: Mapping[str, Any]) -> np.ndarray: ...

    def close(self) -> None: ...


class LocalEnvironments:
    """Gymnasium environments in this process, one after the other: the fastest way for those that step in microseconds.

    A row whose episode ends is reset in the same step. The state is the seed, or the random generator, that each row's
    episode began with, and the actions since: playing them again leads to the same state, in every environment that
    draws from its ``np_random`` only, as Gymnasium asks for.
    """

    waits = True

    def __init__(self, make: Callable[[], Any], num_rows: int) -> None:
        self.environments = [flat(make()) for _ in range(num_rows)]
        self.num_rows = num_rows
        first = self.environments[0]
        self.num_inputs = int(np.prod(first.observation_space.shape))
        self.actions = action_space(first.action_space)
        self._began: list[str] = [""] * num_rows
        self._since: list[list[Any]] = [[] for _ in range(num_rows)]
        self._observations = np.zeros((num_rows, self.num_inputs), np.float32)

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Begin an episode in every row, each with the random numbers of its seed."""
        for row, seed in enumerate(seeds):
            self._observations[row] = self._begin(row, int(seed))
        return self._observations.copy()

    def step(self, actions: np.ndarray, active: np.ndarray | None = None) -> Step:
        """Step all rows, or those that are ``active``."""
        chosen = self.actions.for_environment(actions)
        observations = self._observations.copy()
        rewards = np.zeros(self.num_rows)
        terminated, truncated = (np.zeros(self.num_rows, bool) for _ in range(2))
        final = {}
        for row, environment in enumerate(self.environments):
            if active is not None and not active[row]:
                continue
            action = chosen[row]
            self._since[row].append(action)
            observation, rewards[row], ended, cut, _ = environment.step(action)
            if ended or cut:
                terminated[row], truncated[row] = ended, cut and not ended
                final[row] = as_row(observation)
                observation = self._begin(row)
            observations[row] = as_row(observation)
        self._observations = observations
        return Step(observations, rewards, terminated, truncated, final, None if active is None else ~active)

    def state(self) -> dict[str, Any]:
        return {
            "began": list(self._began),
            "since": [torch.from_numpy(np.array(actions)) for actions in self._since],
            "observations": torch.from_numpy(self._observations.copy()),
        }

    def restore(self, state: Mapping[str, Any]) -> np.ndarray:
        """Play every row's episode again. Raises ``CheckpointError`` where that leads to another observation."""
        for row, environment in enumerate(self.environments):
            began = json.loads(state["began"][row])
            if isinstance(began, int):
                observation = self._begin(row, began)
            else:
                environment.reset(seed=0)  # makes the generator that is then set
                environment.unwrapped.np_random.bit_generator.state = began
                observation = self._begin(row)
            for action in state["since"][row].numpy():
                self._since[row].append(action)
                observation = environment.step(action)[0]
            self._observations[row] = as_row(observation)
        if not np.array_equal(self._observations, state["observations"].numpy()):
            raise CheckpointError(
                "the environment can't be brought back to where it was: it doesn't do the same thing twice",
                way_out="start a new run in another folder",
            )
        return self._observations.copy()

    def close(self) -> None:
        for environment in self.environments:
            environment.close()

    def _begin(self, row: int, seed: int | None = None) -> np.ndarray:
        environment = self.environments[row]
        began = environment.unwrapped.np_random.bit_generator.state if seed is None else seed
        self._began[row] = json.dumps(began)
        self._since[row] = []
        return as_row(environment.reset(seed=seed)[0])


class VectorEnvironments:
    """Any vector environment of Gymnasium (1.0 and later): in one process, in several, or vectorised by itself.

    Its state can't be saved: a run that is resumed begins new episodes.
    """

    waits = False

    def __init__(self, vector: Any) -> None:
        from gymnasium import spaces

        self.vector, self.num_rows = vector, int(vector.num_envs)
        space = vector.single_observation_space
        self.flatten = None if isinstance(space, spaces.Box) else lambda x: spaces.flatten(space, x)
        self.num_inputs = int(spaces.flatdim(space))
        self.actions = action_space(vector.single_action_space)
        mode = vector.metadata.get("autoreset_mode", "NextStep")  # Gymnasium 1.0 knew no other
        self.same_step = "same" in str(getattr(mode, "value", mode)).lower()
        if "disabled" in str(getattr(mode, "value", mode)).lower():
            raise DataError("the vector environment doesn't reset itself", way_out="make it with an autoreset mode")
        self._ended = np.zeros(self.num_rows, bool)

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Begin an episode in every row. What is vectorised by itself may know one seed only: the first."""
        self._ended[:] = False
        numbers = [int(seed) for seed in seeds]
        gymnasium = require_extra("gymnasium", "control")
        try:
            observations, _ = self.vector.reset(seed=numbers)
        except gymnasium.error.Error:
            observations, _ = self.vector.reset(seed=numbers[0])
        return self._rows(observations)

    def step(self, actions: np.ndarray, active: np.ndarray | None = None) -> Step:
        """Step all rows; of those that aren't ``active`` nothing is said."""
        observations, rewards, terminated, truncated, info = self.vector.step(self.actions.for_environment(actions))
        terminated = np.array(terminated, bool)
        truncated = np.array(truncated, bool) & ~terminated
        ended = terminated | truncated
        silent = np.zeros(self.num_rows, bool) if active is None else ~active
        final = {}
        if self.same_step:
            rows = np.flatnonzero(ended & ~silent)
            final = {int(row): self._row(info["final_obs"][row]) for row in rows}
        else:
            silent = silent | self._ended
        self._ended = ended
        return Step(
            observations=self._rows(observations),
            rewards=np.where(silent, 0.0, rewards),
            terminated=terminated & ~silent,
            truncated=truncated & ~silent,
            final_observations=final,
            is_reset=silent if active is not None or not self.same_step else None,
        )

    def state(self) -> None:
        return None

    def restore(self, state: Mapping[str, Any]) -> np.ndarray:
        raise CheckpointError("a vector environment's state can't be saved")

    def close(self) -> None:
        self.vector.close()

    def _row(self, observation: Any) -> np.ndarray:
        return as_row(observation if self.flatten is None else self.flatten(observation))

    def _rows(self, observations: Any) -> np.ndarray:
        if self.flatten is None:
            return np.array(observations, np.float32).reshape(self.num_rows, self.num_inputs)
        return np.stack([self._row(observation) for observation in iterate(self.vector, observations)])


def iterate(vector: Any, observations: Any) -> Any:
    """The observations of a vector environment, one by one."""
    from gymnasium.vector.utils import iterate as one_by_one

    return one_by_one(vector.observation_space, observations)


def flat(environment: Any) -> Any:
    """The environment with observations that are one row of numbers: discrete ones as one-hot."""
    from gymnasium import spaces
    from gymnasium.wrappers import FlattenObservation

    return environment if isinstance(environment.observation_space, spaces.Box) else FlattenObservation(environment)


def as_row(observation: Any) -> np.ndarray:
    return np.asarray(observation, np.float32).ravel()


def make_environment(name: str, **arguments: Any) -> Any:
    """One Gymnasium environment, without the checker that would be asked at every step.

    ``module:Name-v0`` imports the module first. Raises ``MissingExtraError`` or ``DataError``.
    """
    gymnasium = require_extra("gymnasium", "control")
    try:
        if "mujoco" in str(getattr(gymnasium.registry.get(name), "entry_point", "")):
            warn_once_of_mujoco()
        return gymnasium.make(name, disable_env_checker=True, **arguments)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise DataError(
            str(error),
            where=name,
            way_out="`python -c 'import gymnasium; gymnasium.pprint_registry()'` lists what there is",
        ) from error


def warn_once_of_mujoco() -> None:
    """MuJoCo's warnings as Python's, which come once: its own go to stderr and into a file with every environment."""
    mujoco = require_extra("mujoco", "control")
    mujoco.set_mju_user_warning(lambda text: warnings.warn(f"MuJoCo: {text}", stacklevel=2))


def make_environments(name: str, num_rows: int, vectorization: Vectorization = "local") -> Environments:
    """``num_rows`` environments. Raises ``MissingExtraError``, or ``DataError`` for one that isn't there."""
    if vectorization == "local":
        return LocalEnvironments(lambda: make_environment(name), num_rows)
    if vectorization == "envpool":
        return VectorEnvironments(envpool_environments(name, num_rows))
    gymnasium = require_extra("gymnasium", "control")
    make_environment(name).close()  # says what is wrong with the name
    if vectorization == "gymnasium":
        return VectorEnvironments(gymnasium.make_vec(name, num_envs=num_rows))
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    return VectorEnvironments(
        gymnasium.make_vec(name, num_envs=num_rows, vectorization_mode="async", vector_kwargs=mode)
    )


def envpool_environments(name: str, num_rows: int) -> Any:
    envpool = require_extra("envpool", "envpool")
    if name not in envpool.list_all_envs():
        raise DataError(f"envpool has no {name}", way_out="leave --vectorization away")
    return SeededLater(lambda seeds: envpool.make_gymnasium(name, num_envs=num_rows, env_seed=seeds), num_rows)


class SeededLater:
    """envpool's environments, which take their seeds when they are made and not when they are reset."""

    metadata: Mapping[str, Any] = {"autoreset_mode": "NextStep"}

    def __init__(self, make: Callable[[list[int]], Any], num_rows: int) -> None:
        self.make, self.num_envs = make, num_rows
        self.pool = make(list(range(num_rows)))
        self.single_observation_space = self.pool.observation_space
        self.single_action_space = self.pool.action_space

    def reset(self, seed: list[int]) -> tuple[np.ndarray, Any]:
        self.pool = self.make([number % 2**31 for number in seed])  # it takes no larger ones
        return self.pool.reset()

    def step(self, actions: np.ndarray) -> Any:
        whole = np.issubdtype(actions.dtype, np.integer)
        return self.pool.step(actions.astype(np.int32 if whole else self.single_action_space.dtype))

    def close(self) -> None:
        self.pool.close()
