"""A finite Markov decision process. NumPy and SciPy, float64.

A policy is an array [S, A] of probabilities, or [S] of one action for each state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from trueup.errors import DataError

Policy = Float[np.ndarray, "s a"] | Int[np.ndarray, " s"]
Rows = Any
"""``scipy.sparse.csr_array``, of whose types a checker knows too little."""

# Probabilities have to add up to 1 within what float64 loses in adding them.
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False, init=False)
class TabularMDP:
    """States 0…S−1, actions 0…A−1, known dynamics.

    ``transitions``: probability of each next state, as an array [S, A, S'], a sparse matrix [S·A, S'] whose row
    s·A + a belongs to state s and action a, or a list of one sparse matrix [S, S'] for each action. ``rewards``: in one
    of these forms, or [S, A] or [S] where they depend on less. ``start`` [S]: distribution of the first state, by
    default uniform over those that aren't terminal. ``gamma`` in [0, 1]. ``terminal`` [S], bool: states in which the
    episode is over; no action is taken there, so their transitions and rewards have to be 0 (rewards [S] are not read
    there), and so is their value. With γ = 1 every policy that is looked at has to reach one of them.

    What is kept is what can happen: ``transitions`` as a sparse matrix [S·A, S'], ``rewards`` [Z] of each of its Z
    entries. Raises ``DataError`` that names the state and action at fault.
    """

    transitions: Rows
    rewards: Float[np.ndarray, " z"]
    expected_rewards: Float[np.ndarray, "s a"]
    """R(s, a) = Σ_s' P(s'|s, a) · r(s, a, s')."""
    start: Float[np.ndarray, " s"]
    gamma: float
    terminal: Bool[np.ndarray, " s"]

    def __init__(
        self,
        *,
        transitions: Any,
        rewards: Any,
        start: np.ndarray | None = None,
        gamma: float,
        terminal: np.ndarray | None = None,
    ) -> None:
        matrix = _as_rows(transitions).copy()
        num_states = matrix.shape[1]
        if 0 in matrix.shape or matrix.shape[0] % num_states:
            raise DataError(f"transitions have the shape {matrix.shape}", way_out="give them as [S, A, S] or [S·A, S]")
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        index = sparse.get_index_dtype(maxval=max(matrix.nnz, num_states))  # the smallest: products wait for memory
        matrix.indices, matrix.indptr = (x.astype(index, copy=False) for x in (matrix.indices, matrix.indptr))
        terminal = np.zeros(num_states, dtype=bool) if terminal is None else np.array(terminal, dtype=bool)
        start = ~terminal / max(1, np.sum(~terminal)) if start is None else np.array(start, dtype=np.float64)
        for name, array in (("start", start), ("terminal", terminal)):
            if array.shape != (num_states,):
                raise DataError(f"{name} has the shape {array.shape}, expected {(num_states,)}")
        if not 0 <= gamma <= 1:
            raise DataError(f"gamma is {gamma}", way_out="choose it in [0, 1]")
        check_distributions(start[None], "start".format)
        num_actions = matrix.shape[0] // num_states
        earned = _earned(matrix, rewards, num_actions, terminal)
        _check_dynamics(matrix, num_actions, terminal)
        # Fields of a frozen dataclass: what comes out of the checks can't be changed into something unchecked.
        expected = sparse.csr_array((matrix.data * earned, matrix.indices, matrix.indptr), shape=matrix.shape).sum(1)
        for array in (matrix.data, matrix.indices, matrix.indptr, earned, expected, start, terminal):
            array.flags.writeable = False
        for name, value in (
            ("transitions", matrix),
            ("rewards", earned),
            ("expected_rewards", expected.reshape(num_states, num_actions)),
            ("start", start),
            ("gamma", float(gamma)),
            ("terminal", terminal),
        ):
            object.__setattr__(self, name, value)

    @property
    def num_states(self) -> int:
        return self.transitions.shape[1]

    @property
    def num_actions(self) -> int:
        return self.transitions.shape[0] // self.num_states

    @property
    def transition_array(self) -> Float[np.ndarray, "s a s"]:
        """P(s'|s, a) with all its zeros."""
        return self.transitions.toarray().reshape(self.num_states, self.num_actions, self.num_states)

    @property
    def reward_array(self) -> Float[np.ndarray, "s a s"]:
        """r(s, a, s'), 0 where s' can't follow."""
        places = self.transitions.indices, self.transitions.indptr
        matrix = sparse.csr_array((self.rewards, *places), shape=self.transitions.shape)
        return matrix.toarray().reshape(self.num_states, self.num_actions, self.num_states)

    def expected_next(self, values: Float[np.ndarray, " s"]) -> Float[np.ndarray, "s a"]:
        """Σ_s' P(s'|s, a) · values(s')."""
        return (self.transitions @ values).reshape(self.num_states, self.num_actions)


def check_policy(mdp: TabularMDP, policy: Policy) -> None:
    """Raise ``DataError``, naming the state, unless ``policy`` holds a distribution or an action for every state."""
    shapes = [(mdp.num_states, mdp.num_actions), (mdp.num_states,)]
    if policy.shape not in shapes:
        raise DataError(f"the policy has the shape {policy.shape}, expected {shapes[0]} or {shapes[1]}")
    if policy.ndim == 2:
        check_distributions(policy, "policy in state {}".format)
    elif not np.issubdtype(policy.dtype, np.integer):
        raise DataError(f"the policy's actions are {policy.dtype}", way_out="one whole number for each state")
    elif len(wrong := np.flatnonzero((policy < 0) | (policy >= mdp.num_actions))):
        raise DataError(f"there is no action {policy[wrong[0]]}", where=f"policy in state {wrong[0]}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise ``DataError`` unless ``value`` is one of a ``Literal`` type's."""
    if value not in get_args(choices):
        raise DataError(f"{name} is {value!r}", way_out=f"choose one of {', '.join(get_args(choices))}")


def as_probabilities(policy: Policy, num_actions: int) -> Float[np.ndarray, "s a"]:
    """A policy of either form as [S, A]."""
    return policy if policy.ndim == 2 else np.eye(num_actions)[policy]


def chain_of(mdp: TabularMDP, policy: Policy) -> tuple[Rows, Float[np.ndarray, " s"]]:
    """The Markov chain that a policy makes of the process.

        P_π(s, s') = Σ_a π(a|s) · P(s'|s, a),    R_π(s) = Σ_a π(a|s) · R(s, a)

    Returns P_π, sparse [S, S'], and R_π [S]. Raises ``DataError`` for a policy that isn't one.
    """
    check_policy(mdp, policy)
    if policy.ndim == 1:
        states = np.arange(mdp.num_states)
        return mdp.transitions[states * mdp.num_actions + policy], mdp.expected_rewards[states, policy]
    places = np.arange(policy.size), np.arange(0, policy.size + 1, mdp.num_actions)
    choice = sparse.csr_array((policy.ravel(), *places), shape=(mdp.num_states, policy.size))
    return choice @ mdp.transitions, (policy * mdp.expected_rewards).sum(-1)


def check_terminates(mdp: TabularMDP, chain: Rows) -> None:
    """Raise ``DataError`` unless from every state some terminal one can be reached: else undiscounted sums don't
    exist."""
    num_states = mdp.num_states
    # Backwards from one state more, which all terminal ones lead to.
    backwards = sparse.block_array(
        [[chain.T, None], [sparse.csr_array(mdp.terminal[None].astype(float)), sparse.csr_array((1, 1))]], format="csr"
    )
    reached = sparse.csgraph.breadth_first_order(backwards, num_states, return_predecessors=False)
    ends = np.zeros(num_states + 1, dtype=bool)
    ends[reached] = True
    if not ends.all():
        raise DataError(
            "under this policy the episode never ends, so undiscounted sums over it don't exist",
            where=f"state {int(np.flatnonzero(~ends)[0])}",
            way_out="use gamma < 1, or a policy that reaches a terminal state",
        )


def check_distributions(rows: Any, where: Callable[[int], str]) -> None:
    """Raise ``DataError`` unless every row of a matrix, sparse or not, is one; ``where`` says what row number r is."""
    entries = rows.data if sparse.issparse(rows) else rows
    totals = np.asarray(rows.sum(1)).ravel()
    if not np.isfinite(entries).all() or (entries < 0).any():
        row = _first_row(rows, ~np.isfinite(entries) | (entries < 0))
        shown = rows[[row]].toarray()[0] if sparse.issparse(rows) else rows[row]
        raise DataError(f"not probabilities: {shown.tolist()}", where=where(row))
    if len(wrong := np.flatnonzero(np.abs(totals - 1) > TOLERANCE)):
        raise DataError(
            f"probabilities add up to {totals[wrong[0]]:.12g}",
            where=where(int(wrong[0])),
            way_out="they have to add up to 1; a state where the episode is over is marked in `terminal`",
        )


def _first_row(rows: Any, at_fault: np.ndarray) -> int:
    """The row of the first entry at fault."""
    if sparse.issparse(rows):
        return int(np.searchsorted(rows.indptr, np.flatnonzero(at_fault)[0], side="right")) - 1
    return int(np.nonzero(at_fault)[0][0])


def _as_rows(matrix: Any) -> Rows:
    """[S·A, S'] of any of the forms that transitions come in."""
    if sparse.issparse(matrix):
        return sparse.csr_array(matrix, dtype=np.float64)
    if _is_sparse(matrix):
        shapes = {each.shape for each in matrix}
        num_states = matrix[0].shape[1]
        if shapes != {(num_states, num_states)}:
            raise DataError(f"matrices of the shapes {sorted(shapes)}", way_out="give one [S, S] for each action")
        by_action: Rows = sparse.vstack(matrix, format="csr", dtype=np.float64)
        return by_action[np.arange(by_action.shape[0]).reshape(len(matrix), num_states).T.ravel()]
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 3 or array.shape[0] != array.shape[2] or 0 in array.shape:
        raise DataError(f"transitions have the shape {array.shape}", way_out="give them as [S, A, S]")
    return sparse.csr_array(array.reshape(-1, array.shape[2]))


def _earned(matrix: Rows, rewards: Any, num_actions: int, terminal: np.ndarray) -> np.ndarray:
    """r(s, a, s') of every entry of the transitions."""
    num_states = matrix.shape[1]
    if not _is_sparse(rewards):
        rewards = np.asarray(rewards, dtype=np.float64)
        if rewards.shape == (num_states,):
            rewards = np.repeat(np.where(terminal, 0.0, rewards)[:, None], num_actions, axis=1)
        shapes = [(num_states,), (num_states, num_actions), (num_states, num_actions, num_states)]
        if rewards.shape not in shapes:
            raise DataError(f"rewards have the shape {rewards.shape}, expected {shapes[0]}, {shapes[1]} or {shapes[2]}")
    of_pairs = not _is_sparse(rewards) and rewards.ndim == 2
    given: Rows = sparse.csr_array(rewards.reshape(-1, 1)) if of_pairs else _as_rows(rewards)
    if not of_pairs and given.shape != matrix.shape:
        raise DataError(f"rewards have the shape {given.shape}, expected {matrix.shape}")
    if (wrong := ~np.isfinite(given.data)).any():
        where = _state_and_action(_first_row(given, wrong), num_actions)
        raise DataError("a reward is not a finite number", where=where)
    _check_over(given, num_actions, terminal)
    sizes = np.diff(matrix.indptr)
    if of_pairs:
        return np.repeat(rewards.ravel(), sizes)
    return np.asarray(given[np.repeat(np.arange(len(sizes)), sizes), matrix.indices], dtype=np.float64).ravel()


def _check_over(rows: Rows, num_actions: int, terminal: np.ndarray) -> None:
    """Raise ``DataError`` unless nothing but zeros stands in the rows of terminal states."""
    wrong = np.repeat(np.repeat(terminal, num_actions), np.diff(rows.indptr)) & (rows.data != 0)
    if wrong.any():
        raise DataError(
            "a terminal state has transitions or rewards",
            where=_state_and_action(_first_row(rows, wrong), num_actions),
            way_out="set them to 0: no action is taken there; put the reward on the step that leads there",
        )


def _check_dynamics(matrix: Rows, num_actions: int, terminal: np.ndarray) -> None:
    _check_over(matrix, num_actions, terminal)
    rows = np.flatnonzero(np.repeat(~terminal, num_actions))
    live = matrix[rows] if terminal.any() else matrix
    check_distributions(live, lambda row: _state_and_action(int(rows[row]), num_actions))


def _is_sparse(matrix: Any) -> bool:
    """One sparse matrix, or a list of them."""
    if isinstance(matrix, list | tuple):
        return bool(matrix) and all(sparse.issparse(each) for each in matrix)
    return sparse.issparse(matrix)


def _state_and_action(row: int, num_actions: int) -> str:
    return f"state {row // num_actions}, action {row % num_actions}"
