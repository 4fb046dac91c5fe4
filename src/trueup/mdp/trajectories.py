"""All trajectories of a small process, with their probabilities: means over them have no sampling error. NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from trueup.errors import DataError
from trueup.mdp.tabular import Policy, TabularMDP, as_probabilities, check_policy


@dataclass(frozen=True, eq=False, kw_only=True)
class Trajectories:
    """N trajectories of up to T steps, laid out as the objectives take them: time last, one row per trajectory.

    ``mask`` is True on steps that were taken; entries after the end are 0. ``terminated``: the step led to a terminal
    state. ``truncated``: the horizon came first; the value of ``next_states`` there is what a bootstrap has to be.
    ``probabilities`` [N] add up to 1.
    """

    states: Int[np.ndarray, "n t"]
    actions: Int[np.ndarray, "n t"]
    rewards: Float[np.ndarray, "n t"]
    next_states: Int[np.ndarray, "n t"]
    mask: Bool[np.ndarray, "n t"]
    terminated: Bool[np.ndarray, "n t"]
    truncated: Bool[np.ndarray, "n t"]
    probabilities: Float[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.probabilities)


def enumerate_trajectories(
    mdp: TabularMDP, policy: Policy, horizon: int, *, max_trajectories: int = 1_000_000
) -> Trajectories:
    """Every trajectory of positive probability, up to ``horizon`` steps.

        p(τ) = ρ(s_0) · Π_t π(a_t|s_t) · P(s_{t+1}|s_t, a_t)

    An episode that starts in a terminal state is a trajectory without steps. Their number grows exponentially with the
    horizon. Raises ``DataError`` for a policy that isn't one, a horizon below 1, or more than ``max_trajectories``.
    """
    check_policy(mdp, policy)
    if horizon < 1:
        raise DataError(f"the horizon is {horizon}", way_out="it has to be at least 1 step")
    starts = np.flatnonzero(mdp.start)
    transitions, policy = mdp.transition_array, as_probabilities(policy, mdp.num_actions)
    # One row per trajectory so far; the columns of `paths` are s_0, a_0, s_1, a_1, …
    paths, probabilities = starts[:, None], mdp.start[starts]
    over = mdp.terminal[starts]
    finished = [(paths[over], probabilities[over])]
    for _ in range(horizon):
        paths, probabilities = paths[~over], probabilities[~over]
        here = paths[:, -1]
        joint = probabilities[:, None, None] * policy[here][:, :, None] * transitions[here]
        row, action, state = np.nonzero(joint)
        if sum(len(some) for _, some in finished) + len(row) > max_trajectories:
            raise DataError(
                f"more than {max_trajectories} trajectories within {horizon} steps",
                way_out="shorten the horizon, or raise max_trajectories",
            )
        paths, probabilities = np.column_stack([paths[row], action, state]), joint[row, action, state]
        over = mdp.terminal[state]
        finished.append((paths[over], probabilities[over]))
    finished.append((paths[~over], probabilities[~over]))
    return _laid_out(mdp, finished, horizon)


def _laid_out(mdp: TabularMDP, finished: list[tuple[np.ndarray, np.ndarray]], horizon: int) -> Trajectories:
    widened = [
        np.pad(paths, ((0, 0), (0, 2 * horizon + 1 - paths.shape[1])), constant_values=-1) for paths, _ in finished
    ]
    paths = np.concatenate(widened)
    states, actions, next_states = paths[:, 0:-1:2], paths[:, 1::2], paths[:, 2::2]
    mask = actions >= 0
    states, actions, next_states = (np.where(mask, x, 0) for x in (states, actions, next_states))
    last = mask & ~np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    ended = mdp.terminal[next_states]
    return Trajectories(
        states=states,
        actions=actions,
        rewards=np.where(mask, mdp.reward_array[states, actions, next_states], 0.0),
        next_states=next_states,
        mask=mask,
        terminated=last & ended,
        truncated=last & ~ended,
        probabilities=np.concatenate([probabilities for _, probabilities in finished]),
    )
