"""Processes to try things on: random ones, chains, grid worlds. NumPy and SciPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse

from trueup.errors import DataError
from trueup.mdp.outcomes import Outcomes
from trueup.mdp.tabular import Rows, TabularMDP

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Actions of a grid world, as steps of (row, column): up, right, down, left."""


def random_mdp(seed: int, *, num_states: int, num_actions: int, gamma: float, episodic: bool) -> TabularMDP:
    """Dirichlet transitions, normal rewards that depend on state, action and next state, a Dirichlet start.

    ``episodic``: steps lead to higher-numbered states only and the last state is terminal, so that every episode ends
    within ``num_states`` − 1 steps, sooner or later by chance, and enumeration is complete. Otherwise any state can
    follow any other and no episode ends.
    """
    rng = np.random.default_rng(seed)
    shape = (num_states, num_actions, num_states)
    weights = rng.exponential(size=shape)
    terminal = np.zeros(num_states, dtype=bool)
    if episodic:
        weights *= np.triu(np.ones((num_states, num_states)), k=1)[:, None, :]
        terminal[-1] = True
    transitions = weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(float).tiny)
    start = rng.dirichlet(np.ones(num_states)) * ~terminal
    return TabularMDP(
        transitions=transitions,
        rewards=rng.normal(size=shape) * ~terminal[:, None, None],
        start=start / start.sum(),
        gamma=gamma,
        terminal=terminal,
    )


def garnet(seed: int, *, num_states: int, num_actions: int, num_successors: int, gamma: float) -> TabularMDP:
    """Every state and action leads to ``num_successors`` random states; rewards R(s, a) are normal. No episode ends.

    Probabilities are the lengths into which random points cut the unit interval. Raises ``DataError`` for more
    successors than states. Source: Bhatnagar, Sutton, Ghavamzadeh & Lee 2009, "Natural actor-critic algorithms", §7.
    """
    if not 1 <= num_successors <= num_states:
        raise DataError(f"{num_successors} successors among {num_states} states")
    rng = np.random.default_rng(seed)
    shape = (num_states * num_actions, num_successors)
    successors = np.empty(shape, dtype=np.int32)
    again = np.arange(shape[0])
    while len(again):  # rows that hold a state twice are drawn again
        successors[again] = np.sort(rng.integers(num_states, size=(len(again), num_successors), dtype=np.int32), axis=1)
        again = again[(np.diff(successors[again], axis=1) == 0).any(1)]
    weights = rng.exponential(size=shape)
    weights /= weights.sum(1, keepdims=True)
    starts = np.arange(0, successors.size + 1, num_successors)
    return TabularMDP(
        transitions=sparse.csr_array((weights.ravel(), successors.ravel(), starts), shape=(shape[0], num_states)),
        rewards=rng.normal(size=(num_states, num_actions)),
        gamma=gamma,
    )


def chain(rewards: Sequence[float], *, left: float, right: float, gamma: float) -> TabularMDP:
    """States in a row and nothing to decide: one action. A step leads to the left or right neighbour or stays.

    What would lead out of an end stays there. ``rewards`` [S] are earned on leaving a state, wherever to. With ends
    that earn 5 and 10, none between, and 0.4 either way it is the example of *Easy-RL* (Wang et al. 2022), chapter 2.
    """
    size = len(rewards)
    moves: Rows = left * sparse.eye_array(size, k=-1) + right * sparse.eye_array(size, k=1)
    return TabularMDP(
        transitions=sparse.csr_array(moves + sparse.diags_array(1 - moves.sum(1))),
        rewards=np.asarray(rewards, dtype=np.float64),
        gamma=gamma,
    )


def random_walk(num_states: int = 5, *, gamma: float = 1.0) -> TabularMDP:
    """Left or right with the same chance, from the middle until one of two ends; the right one earns 1. One action.

    States 1 … ``num_states`` lie between the ends 0 and ``num_states`` + 1; with γ = 1 the value of state s is
    s / (``num_states`` + 1). Source: Sutton & Barto 2018, example 6.2.
    """
    size = num_states + 2
    transitions, rewards = np.zeros((size, 1, size)), np.zeros((size, 1, size))
    inner = np.arange(1, size - 1)
    transitions[inner, 0, inner - 1] = transitions[inner, 0, inner + 1] = 0.5
    rewards[size - 2, 0, size - 1] = 1.0
    ends = np.isin(np.arange(size), (0, size - 1))
    start = np.eye(size)[(size - 1) // 2]
    return TabularMDP(transitions=transitions, rewards=rewards, start=start, gamma=gamma, terminal=ends)


def grid_world(
    rows: Sequence[str],
    *,
    gamma: float,
    step_reward: float = -1.0,
    rewards: Mapping[str, float] | None = None,
    slip: float = 0.0,
) -> TabularMDP:
    """A map of equally long rows of text; the actions are ``MOVES``, states are counted row by row.

    ``S`` where an episode may begin (without one: anywhere free), ``G`` where it ends, ``#`` a wall, ``C`` a cliff,
    from which one is set back to the start, anything else free. A step into a wall or off the map stays where it is. It
    earns ``step_reward``, or what ``rewards`` says of the character of the cell stepped on. ``slip``: the chance of
    going at a right angle to the left, and the same to the right. Walls and cliffs are states that nobody is ever in,
    marked as terminal. Raises ``DataError`` for a map that isn't one.
    """
    if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise DataError("the rows of the map differ in length, or there are none")
    if not 0 <= slip <= 0.5:
        raise DataError(f"slip is {slip}", way_out="choose it in [0, 0.5]: it counts for either side")
    cells = np.array([list(row) for row in rows])
    flat, (height, width) = cells.ravel(), cells.shape
    begins = np.flatnonzero(flat == "S")
    if (flat == "C").any() and len(begins) != 1:
        raise DataError(f"a cliff sets back to the start, and the map has {len(begins)} of them")
    terminal = np.isin(flat, list("G#C"))  # nobody is ever in a wall or a cliff
    pays = np.array([({"C": -100.0} | dict(rewards or {})).get(str(cell), step_reward) for cell in flat])
    live = np.flatnonzero(~terminal)
    row, column = np.divmod(live, width)
    outcomes: list[Outcomes] = []
    for action in range(len(MOVES)):
        for turn, chance in ((0, 1 - 2 * slip), (1, slip), (-1, slip)):
            down, across = MOVES[(action + turn) % len(MOVES)]
            inside = (row + down >= 0) & (row + down < height) & (column + across >= 0) & (column + across < width)
            entered = np.where(inside, live + down * width + across, live)
            entered = np.where(flat[entered] == "#", live, entered)
            where_then = np.where(flat[entered] == "C", begins[:1].sum(), entered)
            outcomes.append(Outcomes.of(live, action, where_then, chance, pays[entered]))
    return Outcomes.joined(outcomes).process(
        num_states=len(flat),
        num_actions=len(MOVES),
        start=(flat == "S") / len(begins) if len(begins) else None,
        gamma=gamma,
        terminal=terminal,
    )


CLIFF = ("............", "............", "............", "SCCCCCCCCCCG")
"""Sutton & Barto 2018, example 6.6: ``grid_world(CLIFF, gamma=1.0)``."""
