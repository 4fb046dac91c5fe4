"""The best policy of a known process, with a bound on how far the answer can be from the truth. NumPy and SciPy.

With T the optimal Bellman operator and δ = T v − v, the optimal values lie between

    T v + γ/(1−γ) · min δ  ≤  V*  ≤  T v + γ/(1−γ) · max δ

and so does the value of the policy that is greedy in v (MacQueen 1966; Porteus 1971; Puterman 1994, theorem 6.6.3).
Value iteration and its modification stop by this bound, not by the size of δ: a process that forgets quickly where it
began has a δ that is the same in all states long before it is small. Both ends hold where an episode can end, too: δ is
0 in terminal states. With γ = 1 there is no bound, and a policy that is found has to end: where rewards of 0 go round
for ever, T v = v has other solutions than the optimal values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize
from jaxtyping import Float, Int
from scipy import sparse

from trueup.errors import DataError
from trueup.mdp.exact import state_values, values, values_of_actions
from trueup.mdp.linear import Method
from trueup.mdp.tabular import TOLERANCE, Rows, TabularMDP, chain_of, check_terminates

EVALUATED_TO = 0.1
"""Modified policy iteration evaluates a policy until what is left of its own residual's spread is this share of the
one it began with: exact values of a policy that is about to be replaced are worth nothing."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Solution:
    """Optimal values and a policy."""

    values: Float[np.ndarray, " s"]
    policy: Int[np.ndarray, " s"]
    """An action for each state; 0 in terminal ones."""
    error: float
    """‖values − V*‖∞ is at most this; NaN with γ = 1, for which there is no bound."""
    regret: float
    """V* − V_π of this policy is in every state at most this; NaN with γ = 1."""
    residual: float
    """‖T v − v‖∞ of the last look at all actions."""
    sweeps: int
    """How often every action of every state was looked at."""


Progress = Callable[[int, float], None]
"""Told after every sweep: its number, and the bound on the error (with γ = 1 the residual)."""


def value_iteration(
    mdp: TabularMDP, *, tolerance: float = 1e-6, max_sweeps: int = 1_000_000, progress: Progress | None = None
) -> Solution:
    """v ← max_a R(s, a) + γ · Σ_s' P(s'|s, a) · v(s'), until the error's bound is at most ``tolerance``.

    With γ = 1 until no value changes by more than ``tolerance``, with no bound. Raises ``DataError`` if that doesn't
    happen within ``max_sweeps``, if float64 can't bound the error so well, if the policy never ends with γ = 1, and for
    a ``tolerance`` that isn't positive. Source: Bellman 1957; Puterman 1994, §6.3 and 6.6.
    """
    return _improve(mdp, tolerance, max_sweeps, 0, progress)


def modified_policy_iteration(
    mdp: TabularMDP,
    *,
    tolerance: float = 1e-6,
    max_sweeps: int = 1_000_000,
    max_evaluations: int = 1000,
    progress: Progress | None = None,
) -> Solution:
    """Value iteration that follows each greedy policy for a while, which costs a fraction of looking at all actions.

        π ← greedy in v,    v ← T v,    then v ← R_π + γ·P_π·v, up to ``max_evaluations`` times, while that tells much

    Stops and raises as ``value_iteration``. Source: Puterman & Shin 1978; Puterman 1994, §6.5.
    """
    return _improve(mdp, tolerance, max_sweeps, max_evaluations, progress)


def _improve(
    mdp: TabularMDP, tolerance: float, max_sweeps: int, max_evaluations: int, progress: Progress | None
) -> Solution:
    if not tolerance > 0:
        raise DataError(f"tolerance is {tolerance}", way_out="it has to be positive")
    v = mdp.expected_rewards.max(-1)  # T 0, which takes no transitions
    policy = np.full(mdp.num_states, -1)
    chain: tuple[Rows, np.ndarray] | None = None
    for sweep in range(1, max_sweeps + 1):
        q = values_of_actions(mdp, v)
        greedy = q.argmax(-1)
        improved = state_values(q, greedy)
        delta = improved - v
        solution = _bounded(mdp, improved, greedy, delta, sweep)
        left = solution.residual if mdp.gamma == 1 else solution.error
        if progress is not None:
            progress(sweep, left)
        if left <= tolerance:
            return _ending(mdp, solution)
        if solution.error < 2 * (floor := _rounding(mdp, improved)):
            raise DataError(
                f"the error is at most {solution.error:.1e}, and float64 says nothing below {floor:.1e}",
                way_out="raise the tolerance, or lower gamma",
            )
        v = improved
        if not max_evaluations:
            continue
        if chain is None or not np.array_equal(greedy, policy):
            policy, chain = greedy, chain_of(mdp, greedy)
        v = _evaluate(mdp, *chain, v, EVALUATED_TO * _spread(delta), max_evaluations)
    raise DataError(
        f"not within {tolerance:g} after {max_sweeps} sweeps",
        way_out="raise max_sweeps or the tolerance; with gamma = 1 an optimal value may be infinite",
    )


def _evaluate(mdp: TabularMDP, chain: Rows, rewards: np.ndarray, v: np.ndarray, enough: float, most: int) -> np.ndarray:
    """v ← R_π + γ·P_π·v until the changes of all states are so much the same."""
    for _ in range(most):
        after = rewards + mdp.gamma * (chain @ v)
        spread, v = _spread(after - v), after
        if spread <= enough:
            break
    return v


def _spread(delta: np.ndarray) -> float:
    return float(delta.max() - delta.min())


def _rounding(mdp: TabularMDP, improved: np.ndarray) -> float:
    """What of the error's bound is due to what float64 may lose in the sums behind δ; NaN with γ = 1."""
    longest_sum = int(np.diff(mdp.transitions.indptr).max(initial=0)) + 2
    lost = longest_sum * np.finfo(np.float64).eps * float(np.abs(improved).max())
    return np.nan if mdp.gamma == 1 else lost / (1 - mdp.gamma)


def _ending(mdp: TabularMDP, solution: Solution) -> Solution:
    """The solution, if with γ = 1 its policy ends."""
    if mdp.gamma == 1:
        check_terminates(mdp, chain_of(mdp, solution.policy)[0])
    return solution


def _bounded(mdp: TabularMDP, improved: np.ndarray, policy: np.ndarray, delta: np.ndarray, sweeps: int) -> Solution:
    """The middle of the two bounds, and half their distance with what float64 loses; where γ = 1 the values as they
    are. The policy is the greedy one."""
    residual, rounding = float(np.abs(delta).max()), _rounding(mdp, improved)
    factor = np.nan if mdp.gamma == 1 else mdp.gamma / (1 - mdp.gamma)
    shift = 0.0 if mdp.gamma == 1 else factor * (delta.max() + delta.min()) / 2
    return Solution(
        values=np.where(mdp.terminal, 0.0, improved + shift),
        policy=policy,
        error=factor * _spread(delta) / 2 + rounding,
        regret=factor * _spread(delta) + 2 * rounding,
        residual=residual,
        sweeps=sweeps,
    )


def policy_iteration(
    mdp: TabularMDP, *, method: Method = "auto", max_sweeps: int = 10_000, progress: Progress | None = None
) -> Solution:
    """Exact evaluation and greedy improvement until no state changes: ends after finitely many policies.

        V_π from (I − γ·P_π) V = R_π,    π(s) ← argmax_a R(s, a) + γ · Σ_s' P(s'|s, a) · V_π(s')

    Begins with the uniform policy; ties go to the action held, then to the lowest index. ``method``: as for
    ``exact.values``. Raises ``DataError`` as that does, so with γ = 1 if a greedy policy never ends.
    Source: Howard 1960; Sutton & Barto 2018, §4.3.
    """
    policy: np.ndarray = np.full((mdp.num_states, mdp.num_actions), 1 / mdp.num_actions)
    for sweep in range(1, max_sweeps + 1):
        v = values(mdp, policy, method=method)
        q = values_of_actions(mdp, v)
        # Improvement by rounding error alone would make ties switch for ever.
        better = q.max(-1) > state_values(q, policy) + TOLERANCE * (np.abs(q).max() + 1.0)
        improved = q.argmax(-1) if policy.ndim == 2 else np.where(better, q.argmax(-1), policy)
        solution = _bounded(mdp, q.max(-1), improved, q.max(-1) - v, sweep)
        if progress is not None:
            progress(sweep, solution.residual if mdp.gamma == 1 else solution.error)
        if np.array_equal(improved, policy):
            # The policy held isn't the greedy one where they tie but for rounding: by V* − V_π ≤ max δ/(1 − γ).
            regret = np.nan if mdp.gamma == 1 else (q.max(-1) - v).max() / (1 - mdp.gamma) + _rounding(mdp, v)
            return replace(solution, regret=float(regret))
        policy = improved
    raise DataError(f"still improving after {max_sweeps} policies", way_out="raise max_sweeps")


def best_exploring(mdp: TabularMDP, epsilon: float, *, tolerance: float = 1e-6) -> Float[np.ndarray, "s a"]:
    """Q of the best ε-greedy policy: what SARSA converges to while it explores with ε. With ε = 0 it is Q*.

        Q(s, a) = R(s, a) + γ · Σ_s' P(s'|s, a) · V(s'),    V(s) = (1 − ε) · max_a Q(s, a) + ε · mean_a Q(s, a)

    V is the optimum of the process in which every choice gives way to a random one with probability ε. Raises
    ``DataError`` for ε outside [0, 1], and as ``modified_policy_iteration``.
    Source: Sutton & Barto 2018, §5.4 (the environment with the requirement of ε-softness moved inside).
    """
    if not 0 <= epsilon <= 1:
        raise DataError(f"epsilon is {epsilon}", way_out="choose it in [0, 1]")
    over_actions = np.full((mdp.num_actions, mdp.num_actions), 1 / mdp.num_actions)
    choice = (1 - epsilon) * np.eye(mdp.num_actions) + epsilon * over_actions
    moved: Rows = sparse.kron(sparse.eye_array(mdp.num_states), choice, format="csr")
    softened = TabularMDP(
        transitions=moved @ mdp.transitions,
        rewards=mdp.expected_rewards @ choice,
        start=mdp.start,
        gamma=mdp.gamma,
        terminal=mdp.terminal,
    )
    return values_of_actions(mdp, modified_policy_iteration(softened, tolerance=tolerance).values)


def linear_program(mdp: TabularMDP) -> Solution:
    """The smallest values that no action improves on, by HiGHS.

        minimise Σ_s V(s)   subject to   V(s) ≥ R(s, a) + γ · Σ_s' P(s'|s, a) · V(s')   for all s, a

    Raises ``DataError`` if there is no solution, or if with γ = 1 the policy never ends.
    Source: d'Epenoux 1963; Puterman 1994, §6.9.
    """
    identity: Rows = sparse.kron(sparse.eye_array(mdp.num_states), np.ones((mdp.num_actions, 1)), format="csr")
    found = scipy.optimize.linprog(
        np.ones(mdp.num_states),
        A_ub=mdp.gamma * mdp.transitions - identity,
        b_ub=-mdp.expected_rewards.ravel(),
        bounds=(None, None),
        method="highs",
    )
    if not found.success:
        raise DataError(
            f"the linear program has no solution: {found.message}", way_out="use gamma < 1, or rewards that end"
        )
    q = values_of_actions(mdp, found.x)
    return _ending(mdp, _bounded(mdp, q.max(-1), q.argmax(-1), q.max(-1) - found.x, 1))
