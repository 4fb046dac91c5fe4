"""What can be said exactly of a policy on a known process: values come from linear equations."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from trueup.errors import DataError
from trueup.mdp.linear import Method, solve_chain
from trueup.mdp.tabular import Policy, Rows, TabularMDP, chain_of, check_terminates


def values(mdp: TabularMDP, policy: Policy, *, method: Method = "auto") -> Float[np.ndarray, " s"]:
    """The policy's value of every state, from Bellman's equation as a linear system.

        (I − γ·P_π) V = R_π

    ``method``: how it is solved, see ``linear.solve_chain``. Raises ``DataError`` for a policy that isn't one, or if
    γ = 1 and some state never reaches a terminal one. Source: Bellman 1957; Sutton & Barto 2018, eq. 4.4.
    """
    chain, rewards = chain_of(mdp, policy)
    if mdp.gamma == 1:
        check_terminates(mdp, chain)
    return solve_chain(chain, mdp.gamma, rewards, method=method)


def action_values(mdp: TabularMDP, policy: Policy, *, method: Method = "auto") -> Float[np.ndarray, "s a"]:
    """Q(s, a) = R(s, a) + γ · Σ_s' P(s'|s, a) · V(s'). Raises as ``values``."""
    return values_of_actions(mdp, values(mdp, policy, method=method))


def advantages(mdp: TabularMDP, policy: Policy, *, method: Method = "auto") -> Float[np.ndarray, "s a"]:
    """A(s, a) = Q(s, a) − V(s); its mean under the policy is 0 in every state. Raises as ``values``."""
    q = action_values(mdp, policy, method=method)
    return np.where(mdp.terminal[:, None], 0.0, q - state_values(q, policy)[:, None])


def values_of_actions(mdp: TabularMDP, v: Float[np.ndarray, " s"]) -> Float[np.ndarray, "s a"]:
    """From V to Q:  Q(s, a) = R(s, a) + γ · Σ_s' P(s'|s, a) · V(s').  Source: Sutton & Barto 2018, exercise 3.19."""
    return mdp.expected_rewards + mdp.gamma * mdp.expected_next(v)


def state_values(q: Float[np.ndarray, "s a"], policy: Policy) -> Float[np.ndarray, " s"]:
    """From Q to V:  V(s) = Σ_a π(a|s) · Q(s, a).  Source: Sutton & Barto 2018, exercise 3.18."""
    return q[np.arange(len(q)), policy] if policy.ndim == 1 else (policy * q).sum(-1)


def bellman_residual(mdp: TabularMDP, policy: Policy, v: Float[np.ndarray, " s"]) -> float:
    """How far given values are from solving Bellman's equation of a policy.

        ‖R_π + γ·P_π·v − v‖∞,    and    ‖v − V_π‖∞ ≤ residual / (1 − γ)

    Raises ``DataError`` for a policy that isn't one.
    """
    chain, rewards = chain_of(mdp, policy)
    return float(np.abs(rewards + mdp.gamma * (chain @ v) - v).max())


def occupancy(
    mdp: TabularMDP, policy: Policy, *, discounted: bool = True, method: Method = "auto"
) -> Float[np.ndarray, " s"]:
    """How often each state is visited, discounted or not: not normalised.

        d(s) = Σ_t γ^t · Pr(s_t = s)    from    (I − γ·P_πᵀ) d = ρ,    and with γ = 1 if not ``discounted``

    Raises ``DataError`` as ``values``; undiscounted visits of a chain that never ends are infinite, and raise too.
    Source: Puterman 1994 (the dual of Bellman's equation); Sutton et al. 2000.
    """
    chain, _ = chain_of(mdp, policy)
    gamma = mdp.gamma if discounted else 1.0
    if gamma == 1:
        check_terminates(mdp, chain)
    return solve_chain(chain.T.tocsr(), gamma, mdp.start, method=method)


def expected_return(mdp: TabularMDP, policy: Policy) -> float:
    """J = Σ_s ρ(s) · V(s), the mean discounted return of an episode. Raises as ``values``."""
    return float(mdp.start @ values(mdp, policy))


def expected_returns(
    mdp: TabularMDP, policies: Float[np.ndarray, "r s a"] | Int[np.ndarray, "r s"], *, horizon: int = 1000
) -> Float[np.ndarray, " r"]:
    """J of R policies at once; with γ = 1 of their first ``horizon`` steps only, since a policy may never end.

    Raises ``DataError`` for a policy that isn't one, or a horizon below 0.
    """
    chains, rewards = zip(*(chain_of(mdp, policy) for policy in policies), strict=True)
    chain: Rows = sparse.block_diag(chains, format="csr")
    earned = np.concatenate(rewards)
    if mdp.gamma < 1:
        return solve_chain(chain, mdp.gamma, earned).reshape(len(policies), -1) @ mdp.start
    onwards, there, returns = chain.T.tocsr(), np.tile(mdp.start, len(policies)), np.zeros(len(policies))
    for _ in range(_checked(horizon)):
        if not there.any():  # terminal states lead nowhere
            break
        returns += (there * earned).reshape(len(policies), -1).sum(-1)
        there = onwards @ there
    return returns


def visited(mdp: TabularMDP, policy: Policy) -> Bool[np.ndarray, " s"]:
    """The states that a policy ever acts in: that can be reached from where episodes begin, and aren't terminal.

    Raises ``DataError`` for a policy that isn't one.
    """
    onwards, seen = chain_of(mdp, policy)[0].T.tocsr(), mdp.start > 0
    while (more := seen | (onwards @ seen > 0)).sum() > seen.sum():
        seen = more
    return seen & ~mdp.terminal


def finite_horizon_values(mdp: TabularMDP, policy: Policy, horizon: int) -> Float[np.ndarray, "h s"]:
    """Values of what is left of an episode of ``horizon`` steps, one row for each number of steps left, 0 … horizon.

        V_0 = 0,    V_h = R_π + γ·P_π·V_{h−1}

    Raises ``DataError`` for a policy that isn't one, or a negative horizon. Source: Puterman 1994, §4.2.
    """
    chain, rewards = chain_of(mdp, policy)
    rows = [np.zeros(mdp.num_states)]
    for _ in range(_checked(horizon)):
        rows.append(rewards + mdp.gamma * (chain @ rows[-1]))
    return np.stack(rows)


def finite_horizon_optimum(mdp: TabularMDP, horizon: int) -> tuple[Float[np.ndarray, "h s"], np.ndarray]:
    """The best that can be had in ``horizon`` steps, and how: backward induction.

        V_0 = 0,    V_h(s) = max_a R(s, a) + γ · Σ_s' P(s'|s, a) · V_{h−1}(s')

    Returns values [horizon + 1, S] and actions [horizon, S]; row h of the values is for h steps left, row h of the
    actions for h + 1. Raises ``DataError`` for a negative horizon. Source: Bellman 1957; Puterman 1994, §4.5.
    """
    rows, actions = [np.zeros(mdp.num_states)], []
    for _ in range(_checked(horizon)):
        q = values_of_actions(mdp, rows[-1])
        actions.append(q.argmax(-1))
        rows.append(q.max(-1))
    return np.stack(rows), np.array(actions, dtype=np.int64).reshape(horizon, mdp.num_states)


def _checked(horizon: int) -> int:
    if horizon < 0:
        raise DataError(f"the horizon is {horizon}", way_out="it has to be at least 0 steps")
    return horizon
