"""Random processes to test against: nothing about them is special. NumPy."""

from __future__ import annotations

import numpy as np

from trueup.mdp.tabular import TabularMDP


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
