"""Processes from lists of what can follow what: observed, or written down by somebody else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from scipy import sparse

from trueup.errors import DataError
from trueup.mdp.tabular import Rows, TabularMDP


class Outcomes(NamedTuple):
    """N times "action a in state s leads to s' with this weight, and earns this": arrays [N]."""

    states: np.ndarray
    actions: np.ndarray
    next_states: np.ndarray
    weights: np.ndarray
    rewards: np.ndarray

    @classmethod
    def of(cls, *columns: Any) -> Self:
        """From arrays and numbers that broadcast to one length."""
        return cls(*(np.array(column).ravel() for column in np.broadcast_arrays(*columns)))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def process(self, *, num_states: int, num_actions: int, **fields: Any) -> TabularMDP:
        """The process in which they come true as often as they weigh.

        Outcomes with the same s, a and s' are one, with the weighted mean of their rewards: a reward's spread beyond
        what (s, a, s') says is no part of a ``TabularMDP``. ``fields``: ``gamma``, ``start``, ``terminal``. Raises
        ``DataError`` as ``TabularMDP``, or for a state or action that there isn't.
        """
        for name, indices, size in (
            ("state", self.states, num_states),
            ("next state", self.next_states, num_states),
            ("action", self.actions, num_actions),
        ):
            if len(wrong := np.flatnonzero((indices < 0) | (indices >= size))):
                raise DataError(f"there is no {name} {indices[wrong[0]]} among {size}", where=f"outcome {wrong[0]}")
        places = self.states.astype(np.int64) * num_actions + self.actions, self.next_states
        shape = (num_states * num_actions, num_states)
        weights: Rows = sparse.coo_array((self.weights.astype(np.float64), places), shape=shape).tocsr()
        earned: Rows = sparse.coo_array((self.weights * self.rewards, places), shape=shape).tocsr()
        with np.errstate(divide="ignore", invalid="ignore"):
            earned.data = np.where(weights.data == 0, 0.0, earned.data / weights.data)
        return TabularMDP(transitions=weights, rewards=earned, **fields)


def from_observed(
    states: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    next_states: np.ndarray,
    terminated: np.ndarray,
    *,
    gamma: float,
    num_states: int | None = None,
    num_actions: int | None = None,
    unseen_reward: float | None = None,
) -> TabularMDP:
    """The likeliest process behind N observed steps, arrays [N]: each probability is a share of counts.

        P(s'|s, a) = n(s, a, s') / n(s, a),    r(s, a, s') = the mean of what was earned there

    The states that ``terminated`` steps led to are terminal. ``unseen_reward``: an action that was never tried in a
    state that isn't terminal ends the episode there and earns this; a low number makes a plan keep to what is known.
    Without it such an action is refused: raises ``DataError`` that names the first, or a state that some steps ended in
    and others went on from. Source: certainty equivalence, Sutton & Barto 2018, §6.3.
    """
    ended = np.asarray(terminated, dtype=bool)
    num_states = int(max(np.max(states), np.max(next_states))) + 1 if num_states is None else num_states
    num_actions = int(np.max(actions)) + 1 if num_actions is None else num_actions
    terminal = np.zeros(num_states + (unseen_reward is not None), dtype=bool)
    terminal[np.asarray(next_states)[ended]] = True
    if len(wrong := np.flatnonzero(terminal[states])):
        raise DataError(
            f"state {states[wrong[0]]} ends an episode elsewhere, and this step starts from it",
            where=f"step {wrong[0]}",
            way_out="give the end of an episode a state of its own",
        )
    counts = np.zeros((num_states, num_actions))
    np.add.at(counts, (states, actions), 1.0)
    tried = Outcomes.of(states, actions, next_states, 1.0 / counts[states, actions], rewards)
    missing = np.argwhere((counts == 0) & ~terminal[:num_states, None])
    if unseen_reward is not None:
        terminal[num_states] = True
        beyond = Outcomes.of(missing[:, 0], missing[:, 1], num_states, 1.0, unseen_reward)
        tried = Outcomes.joined([tried, beyond])
    elif len(missing):
        raise DataError(
            "was never observed",
            where="state {}, action {}".format(*missing[0]),
            way_out="give unseen_reward: what it shall be taken to earn, the episode ending there",
        )
    return tried.process(num_states=len(terminal), num_actions=num_actions, gamma=gamma, terminal=terminal)


def from_gymnasium(environment: Any, *, gamma: float) -> TabularMDP:
    """The process of a Gymnasium environment that has its dynamics in a table, as the toy-text ones do.

    ``environment``: FrozenLake, Taxi, CliffWalking, … as ``gymnasium.make`` gives them. One state is added behind
    theirs, the last: where every terminating step leads to. Raises ``DataError`` for an environment without a table.
    """
    inner = environment.unwrapped
    table: Mapping[int, Mapping[int, Any]] | None = getattr(inner, "P", None)
    if table is None:
        raise DataError(
            f"{type(inner).__name__} has no table of its dynamics (an attribute P)",
            way_out="take FrozenLake, Taxi or CliffWalking, or observed transitions",
        )
    rows = [
        (state, action, len(table) if terminated else next_state, probability, reward)
        for state, actions in table.items()
        for action, outcomes in actions.items()
        for probability, next_state, reward, terminated in outcomes
    ]
    start = getattr(inner, "initial_state_distrib", None)
    return Outcomes(*map(np.array, zip(*rows, strict=True))).process(
        num_states=len(table) + 1,
        num_actions=len(table[0]),
        start=None if start is None else np.append(start, 0.0),
        gamma=gamma,
        terminal=np.arange(len(table) + 1) == len(table),
    )
