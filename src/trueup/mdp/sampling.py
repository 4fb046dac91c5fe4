"""Experience in a known process: many independent runs at once, or whole episodes. NumPy.

What learns from experience (``estimation``, ``learning``) sees only what is drawn here, never the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from trueup.errors import DataError
from trueup.mdp.tabular import Policy, TabularMDP, check_policy
from trueup.mdp.trajectories import Trajectories


class Steps(NamedTuple):
    """One step of each of R runs, arrays [R]."""

    states: Int[np.ndarray, " r"]
    actions: Int[np.ndarray, " r"]
    rewards: Float[np.ndarray, " r"]
    next_states: Int[np.ndarray, " r"]
    terminated: Bool[np.ndarray, " r"]


class Sampler:
    """Draws first states, actions and next states by inverting their cumulated probabilities."""

    def __init__(self, mdp: TabularMDP, rng: np.random.Generator) -> None:
        self.mdp, self.rng = mdp, rng
        self.ends = mdp.transitions.indptr
        self.cumulated = np.concatenate([[0.0], np.cumsum(mdp.transitions.data)])
        self.start = np.cumsum(mdp.start)

    def first_states(self, num: int) -> Int[np.ndarray, " r"]:
        return self._inverted(self.start, self.rng.random(num) * self.start[-1])

    def actions(self, policy: Policy, states: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r"]:
        return policy[states] if policy.ndim == 1 else self.choices(policy[states])

    def choices(self, probabilities: Float[np.ndarray, "r a"]) -> Int[np.ndarray, " r"]:
        """One action for each row."""
        cumulated = probabilities.cumsum(-1)
        drawn = self.rng.random(len(cumulated))[:, None] * cumulated[:, -1:]
        return (cumulated <= drawn).sum(-1)

    def steps(self, states: Int[np.ndarray, " r"], actions: Int[np.ndarray, " r"]) -> Steps:
        """What follows; ``states`` must not be terminal."""
        row = states * self.mdp.num_actions + actions
        first, last = self.ends[row], self.ends[row + 1]
        low, high = self.cumulated[first], self.cumulated[last]
        drawn = low + self.rng.random(len(row)) * (high - low)
        # Rounding in the sum over all rows must not lead into the neighbour's.
        entry = np.clip(np.searchsorted(self.cumulated, drawn, side="right") - 1, first, last - 1)
        next_states = self.mdp.transitions.indices[entry].astype(np.int64)
        return Steps(states, actions, self.mdp.rewards[entry], next_states, self.mdp.terminal[next_states])

    @staticmethod
    def _inverted(cumulated: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(cumulated, drawn, side="right"), len(cumulated) - 1)


class Runs:
    """R runs side by side, each beginning anew when its episode has ended."""

    def __init__(self, mdp: TabularMDP, num_runs: int, seed: int) -> None:
        if mdp.terminal[mdp.start > 0].any():
            raise DataError("an episode can begin in a terminal state", way_out="give such states no start probability")
        self.sampler = Sampler(mdp, np.random.default_rng(seed))
        self.states = self.sampler.first_states(num_runs)

    def step(self, actions: Int[np.ndarray, " r"]) -> Steps:
        """Take an action in every run. ``states`` are then where each run goes on, a first one after an end."""
        taken = self.sampler.steps(self.states, actions)
        self.states = np.where(taken.terminated, self.sampler.first_states(len(actions)), taken.next_states)
        return taken


def sample_trajectories(
    mdp: TabularMDP, policy: Policy, *, num_trajectories: int, horizon: int, seed: int = 0
) -> Trajectories:
    """Episodes of up to ``horizon`` steps, drawn independently; those that haven't ended by then are ``truncated``.

    Each has the same share of ``probabilities``, so that sums over them estimate what sums over
    ``enumerate_trajectories`` are. Raises ``DataError`` for a policy that isn't one, or a horizon below 1.
    """
    check_policy(mdp, policy)
    sampler = Sampler(mdp, np.random.default_rng(seed))
    return episodes(sampler, lambda rows, states: sampler.actions(policy, states), num_trajectories, horizon)


def episodes(
    sampler: Sampler,
    act: Callable[[Int[np.ndarray, " r"], Int[np.ndarray, " r"]], Int[np.ndarray, " r"]],
    num: int,
    horizon: int,
) -> Trajectories:
    """As ``sample_trajectories``, with a policy for each episode: ``act`` takes their numbers and the states they are
    in, and says what each does."""
    if horizon < 1:
        raise DataError(f"the horizon is {horizon}", way_out="it has to be at least 1 step")
    here = sampler.first_states(num)
    going = np.flatnonzero(~sampler.mdp.terminal[here])
    columns: list[tuple[np.ndarray, Steps]] = []
    while len(going) and len(columns) < horizon:
        taken = sampler.steps(here[going], act(going, here[going]))
        columns.append((going, taken))
        here[going] = taken.next_states
        going = going[~taken.terminated]
    shape = (num, max(1, len(columns)))
    whole: dict[str, np.ndarray] = {}
    whole |= {name: np.zeros(shape, dtype=np.int64) for name in ("states", "actions", "next_states")}
    whole |= {name: np.zeros(shape, dtype=bool) for name in ("mask", "terminated", "truncated")}
    whole["rewards"] = np.zeros(shape)
    for column, (rows, taken) in enumerate(columns):
        for name, values in taken._asdict().items():
            whole[name][rows, column] = values
        whole["mask"][rows, column] = True
    whole["truncated"][going, -1] = True
    return Trajectories(**whole, probabilities=np.full(num, 1 / num))
