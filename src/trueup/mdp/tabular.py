"""A finite Markov decision process, and everything about it that can be computed exactly. NumPy float64.

A policy is an array ``[S, A]`` of probabilities. Nothing here samples or iterates to a tolerance (but for
``optimal_policy``, which ends after finitely many improvements): values come from linear equations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

from trueup.errors import DataError

Policy = Float[np.ndarray, "s a"]

# Probabilities have to add up to 1 within what float64 loses in adding them.
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False, init=False)
class TabularMDP:
    """States 0…S−1, actions 0…A−1, known dynamics.

    ``transitions`` [S, A, S']: probability of each next state. ``rewards``: [S, A, S'], or [S, A] where the reward
    doesn't depend on the next state. ``start`` [S]: distribution of the first state. ``gamma`` in [0, 1].
    ``terminal`` [S], bool: states in which the episode is over; no action is taken there, so their transitions and
    rewards have to be 0, and so is their value. With γ = 1 every policy that is looked at has to reach one of them.

    Raises ``DataError`` that names the state and action at fault.
    """

    transitions: Float[np.ndarray, "s a s"]
    rewards: Float[np.ndarray, "s a s"]
    start: Float[np.ndarray, " s"]
    gamma: float
    terminal: Bool[np.ndarray, " s"]

    def __init__(
        self,
        *,
        transitions: np.ndarray,
        rewards: np.ndarray,
        start: np.ndarray,
        gamma: float,
        terminal: np.ndarray | None = None,
    ) -> None:
        transitions, rewards, start = (np.asarray(x, dtype=np.float64) for x in (transitions, rewards, start))
        if transitions.ndim != 3 or transitions.shape[0] != transitions.shape[2] or 0 in transitions.shape:
            raise DataError(f"transitions have the shape {transitions.shape}", way_out="give them as [S, A, S]")
        num_states, num_actions, _ = transitions.shape
        if rewards.shape == (num_states, num_actions):
            rewards = np.repeat(rewards[:, :, None], num_states, axis=2)
        terminal = np.zeros(num_states, dtype=bool) if terminal is None else np.asarray(terminal, dtype=bool)
        for name, array, shape in (
            ("rewards", rewards, transitions.shape),
            ("start", start, (num_states,)),
            ("terminal", terminal, (num_states,)),
        ):
            if array.shape != shape:
                raise DataError(f"{name} has the shape {array.shape}, expected {shape}")
        # Fields of a frozen dataclass: what comes out of the checks can't be changed into something unchecked.
        for name, value in (
            ("transitions", transitions.copy()),
            ("rewards", np.where(transitions > 0, rewards, 0.0)),
            ("start", start.copy()),
            ("terminal", terminal.copy()),
        ):
            value.flags.writeable = False
            object.__setattr__(self, name, value)
        object.__setattr__(self, "gamma", float(gamma))
        self._check(rewards)

    def _check(self, rewards: np.ndarray) -> None:
        if not 0 <= self.gamma <= 1:
            raise DataError(f"gamma is {self.gamma}", way_out="choose it in [0, 1]")
        _check_distribution(self.start, "start")
        for state, action in np.ndindex(self.num_states, self.num_actions):
            where = f"state {state}, action {action}"
            if not np.isfinite(rewards[state, action]).all():
                raise DataError("a reward is not a finite number", where=where)
            if not self.terminal[state]:
                _check_distribution(self.transitions[state, action], where)
            elif self.transitions[state, action].any() or rewards[state, action].any():
                raise DataError(
                    "a terminal state has transitions or rewards",
                    where=where,
                    way_out="set them to 0: no action is taken there; put the reward on the step that leads there",
                )

    @property
    def num_states(self) -> int:
        return self.transitions.shape[0]

    @property
    def num_actions(self) -> int:
        return self.transitions.shape[1]

    @property
    def expected_rewards(self) -> Float[np.ndarray, "s a"]:
        """R(s, a) = Σ_s' P(s'|s, a) · r(s, a, s')."""
        return (self.transitions * self.rewards).sum(-1)


def values(mdp: TabularMDP, policy: Policy) -> Float[np.ndarray, " s"]:
    """The policy's value of every state, from Bellman's equation as a linear system.

        (I − γ·P_π) V = R_π

    Raises ``DataError`` for a policy that isn't one, or if γ = 1 and some state never reaches a terminal one.
    Source: Bellman 1957; Sutton & Barto 2018, eq. 4.4.
    """
    chain, rewards = _chain(mdp, policy)
    if mdp.gamma == 1:
        _check_terminates(mdp, chain)
    return scipy.linalg.solve(np.eye(mdp.num_states) - mdp.gamma * chain, rewards)


def action_values(mdp: TabularMDP, policy: Policy) -> Float[np.ndarray, "s a"]:
    """Q(s, a) = R(s, a) + γ · Σ_s' P(s'|s, a) · V(s'). Raises as ``values``."""
    return mdp.expected_rewards + mdp.gamma * mdp.transitions @ values(mdp, policy)


def advantages(mdp: TabularMDP, policy: Policy) -> Float[np.ndarray, "s a"]:
    """A(s, a) = Q(s, a) − V(s); its mean under the policy is 0 in every state. Raises as ``values``."""
    q = action_values(mdp, policy)
    return np.where(mdp.terminal[:, None], 0.0, q - (policy * q).sum(-1, keepdims=True))


def occupancy(mdp: TabularMDP, policy: Policy, *, discounted: bool = True) -> Float[np.ndarray, " s"]:
    """How often each state is visited, discounted or not: not normalised.

        d(s) = Σ_t γ^t · Pr(s_t = s)    from    (I − γ·P_πᵀ) d = ρ,    and with γ = 1 if not ``discounted``

    Raises ``DataError`` as ``values``; undiscounted visits of a chain that never ends are infinite, and raise too.
    Source: Puterman 1994 (the dual of Bellman's equation); Sutton et al. 2000.
    """
    chain, _ = _chain(mdp, policy)
    gamma = mdp.gamma if discounted else 1.0
    if gamma == 1:
        _check_terminates(mdp, chain)
    return scipy.linalg.solve(np.eye(mdp.num_states) - gamma * chain.T, mdp.start)


def expected_return(mdp: TabularMDP, policy: Policy) -> float:
    """J = Σ_s ρ(s) · V(s), the mean discounted return of an episode. Raises as ``values``."""
    return float(mdp.start @ values(mdp, policy))


def optimal_policy(mdp: TabularMDP) -> Policy:
    """A deterministic policy that no other one beats in any state, by policy iteration: exact, not to a tolerance.

    Starts from the uniform policy and improves greedily until no state changes; ties go to the action held, then to the
    lowest index. With γ = 1, raises ``DataError`` as ``values`` if a greedy policy never ends.
    Source: Howard 1960; Sutton & Barto 2018, §4.3.
    """
    policy = np.full((mdp.num_states, mdp.num_actions), 1 / mdp.num_actions)
    while True:
        q = action_values(mdp, policy)
        held = (policy * q).sum(-1)
        scale = np.abs(q).max() + 1.0
        # Improvement by rounding error alone would make ties switch for ever.
        better = q.max(-1) > held + TOLERANCE * scale
        greedy = np.eye(mdp.num_actions)[q.argmax(-1)]
        deterministic = policy.max(-1) == 1
        improved = np.where((better | ~deterministic)[:, None], greedy, policy)
        if np.array_equal(improved, policy):
            return policy
        policy = improved


def check_policy(mdp: TabularMDP, policy: Policy) -> None:
    """Raise ``DataError``, naming the state, unless ``policy`` [S, A] holds a distribution for every state."""
    if policy.shape != (mdp.num_states, mdp.num_actions):
        raise DataError(f"the policy has the shape {policy.shape}, expected {(mdp.num_states, mdp.num_actions)}")
    for state in range(mdp.num_states):
        _check_distribution(policy[state], f"policy in state {state}")


def _chain(mdp: TabularMDP, policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """P_π [S, S'] and R_π [S] of the Markov chain that the policy makes of the process."""
    check_policy(mdp, policy)
    return np.einsum("sa,sat->st", policy, mdp.transitions), (policy * mdp.expected_rewards).sum(-1)


def _check_distribution(probabilities: np.ndarray, where: str) -> None:
    if not np.isfinite(probabilities).all() or (probabilities < 0).any():
        raise DataError(f"not probabilities: {probabilities.tolist()}", where=where)
    if abs(probabilities.sum() - 1) > TOLERANCE:
        raise DataError(
            f"probabilities add up to {probabilities.sum():.12g}",
            where=where,
            way_out="they have to add up to 1; a state where the episode is over is marked in `terminal`",
        )


def _check_terminates(mdp: TabularMDP, chain: np.ndarray) -> None:
    """From every state some terminal one can be reached; else undiscounted sums don't exist."""
    ends = mdp.terminal.copy()
    for _ in range(mdp.num_states):
        ends |= chain[:, ends].sum(-1) > 0
    if not ends.all():
        raise DataError(
            "under this policy the episode never ends, so undiscounted sums over it don't exist",
            where=f"state {int(np.flatnonzero(~ends)[0])}",
            way_out="use gamma < 1, or a policy that reaches a terminal state",
        )
