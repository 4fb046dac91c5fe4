"""Enumeration: every trajectory once, with its probability, in the layout that the objectives take."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import TabularMDP, Trajectories, enumerate_trajectories
from trueup.mdp.generators import random_mdp


def coin(gamma: float = 1.0) -> TabularMDP:
    """State 0: action 0 earns 5 and ends; action 1, by a fair coin, earns 1 and ends, or 2 and stays. 1 is terminal."""
    transitions, rewards = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    transitions[0, 0, 1], transitions[0, 1] = 1, [0.5, 0.5]
    rewards[0, 0, 1], rewards[0, 1] = 5, [2, 1]
    return TabularMDP(
        transitions=transitions,
        rewards=rewards,
        start=np.array([1.0, 0]),
        gamma=gamma,
        terminal=np.array([False, True]),
    )


def rows(paths: Trajectories) -> dict[tuple, tuple]:
    return {
        tuple(zip(paths.actions[i][m], paths.rewards[i][m], paths.next_states[i][m], strict=True)): (
            paths.probabilities[i],
            paths.terminated[i].tolist(),
            paths.truncated[i].tolist(),
        )
        for i, m in enumerate(paths.mask)
    }


def test_golden() -> None:
    policy = np.array([[0.25, 0.75], [0.5, 0.5]])
    paths = enumerate_trajectories(coin(), policy, horizon=2)
    assert len(paths) == 5
    again = 0.75 * 0.5
    assert rows(paths) == {
        ((0, 5, 1),): (0.25, [True, False], [False, False]),
        ((1, 1, 1),): (again, [True, False], [False, False]),
        ((1, 2, 0), (0, 5, 1)): (again * 0.25, [False, True], [False, False]),
        ((1, 2, 0), (1, 1, 1)): (again * again, [False, True], [False, False]),
        ((1, 2, 0), (1, 2, 0)): (again * again, [False, False], [False, True]),
    }


@pytest.mark.parametrize("episodic", [True, False])
def test_properties(episodic: bool) -> None:
    mdp = random_mdp(5, num_states=4, num_actions=2, gamma=0.9, episodic=episodic)
    policy = np.random.default_rng(0).dirichlet(np.ones(2), size=4)
    paths = enumerate_trajectories(mdp, policy, horizon=3)
    assert paths.probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert (paths.probabilities > 0).all()
    # each path ends once: terminated, or truncated by the horizon
    ends = paths.terminated | paths.truncated
    assert (ends.sum(-1) == 1).all()
    assert paths.truncated.any() != episodic
    assert (paths.mask.sum(-1) == ends.argmax(-1) + 1).all()
    inner = paths.mask[:, 1:]
    assert (paths.states[:, 1:][inner] == paths.next_states[:, :-1][inner]).all()
    keys = np.concatenate([paths.states, paths.actions, paths.next_states, paths.mask], axis=1)
    assert len(np.unique(keys, axis=0)) == len(paths)
    # p(τ) is the product of what was drawn
    factors = policy[paths.states, paths.actions] * mdp.transition_array[paths.states, paths.actions, paths.next_states]
    product = mdp.start[paths.states[:, 0]] * np.where(paths.mask, factors, 1).prod(-1)
    np.testing.assert_allclose(paths.probabilities, product, atol=1e-15)


def test_impossible_branches_are_left_out() -> None:
    paths = enumerate_trajectories(coin(), np.array([[1.0, 0.0], [0.5, 0.5]]), horizon=3)
    assert len(paths) == 1
    assert paths.rewards.tolist() == [[5, 0, 0]]


def test_an_episode_that_starts_at_its_end_has_no_steps() -> None:
    mdp = coin()
    half = TabularMDP(
        transitions=mdp.transition_array,
        rewards=mdp.reward_array,
        start=np.array([0.5, 0.5]),
        gamma=1.0,
        terminal=mdp.terminal,
    )
    paths = enumerate_trajectories(half, np.array([[1.0, 0.0], [0.5, 0.5]]), horizon=2)
    assert paths.mask.tolist() == [[False, False], [True, False]]
    assert paths.probabilities.tolist() == [0.5, 0.5]
    assert not paths.truncated.any()


def test_refusals() -> None:
    policy = np.full((2, 2), 0.5)
    with pytest.raises(DataError, match="horizon is 0"):
        enumerate_trajectories(coin(), policy, horizon=0)
    with pytest.raises(DataError, match="more than 10 trajectories within 20 steps"):
        enumerate_trajectories(coin(), policy, horizon=20, max_trajectories=10)
    with pytest.raises(DataError, match="policy in state 0"):
        enumerate_trajectories(coin(), 2 * policy, horizon=1)
