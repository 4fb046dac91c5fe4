"""Both ways between V and Q, residuals, horizons. Values and occupancy themselves: tests/mdp/test_tabular.py."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import enumerate_trajectories, exact
from trueup.mdp.generators import CLIFF, garnet, grid_world, random_mdp

MDP = random_mdp(3, num_states=3, num_actions=2, gamma=0.8, episodic=False)
POLICY = np.random.default_rng(0).dirichlet(np.ones(2), size=3)


def test_there_and_back() -> None:
    v = exact.values(MDP, POLICY)
    q = exact.values_of_actions(MDP, v)
    np.testing.assert_allclose(q, exact.action_values(MDP, POLICY))
    np.testing.assert_allclose(exact.state_values(q, POLICY), v)
    np.testing.assert_allclose(exact.state_values(q, np.array([1, 0, 1])), [q[0, 1], q[1, 0], q[2, 1]])


def test_the_residual_bounds_the_error() -> None:
    v = exact.values(MDP, POLICY)
    assert exact.bellman_residual(MDP, POLICY, v) < 1e-14
    off = v + np.array([0.1, -0.2, 0.0])
    residual = exact.bellman_residual(MDP, POLICY, off)
    assert np.abs(off - v).max() <= residual / (1 - MDP.gamma)
    assert residual > 0.2 * (1 - MDP.gamma)


@pytest.mark.parametrize("method", ["dense", "lu", "krylov"])
def test_all_methods_reach_all_quantities(method) -> None:
    mdp = garnet(0, num_states=50, num_actions=3, num_successors=4, gamma=0.95)
    policy = np.random.default_rng(0).dirichlet(np.ones(3), size=50)
    for quantity in (exact.values, exact.action_values, exact.advantages, exact.occupancy):
        np.testing.assert_allclose(quantity(mdp, policy, method=method), quantity(mdp, policy), atol=1e-9)


def test_values_of_what_is_left_are_sums_over_trajectories() -> None:
    by_steps_left = exact.finite_horizon_values(MDP, POLICY, 4)
    assert not by_steps_left[0].any()
    for horizon in (1, 2, 4):
        paths = enumerate_trajectories(MDP, POLICY, horizon)
        returns = (paths.rewards * MDP.gamma ** np.arange(horizon)).sum(-1)
        assert MDP.start @ by_steps_left[horizon] == pytest.approx(paths.probabilities @ returns, abs=1e-12)


def test_backward_induction_is_the_best_of_all_plans() -> None:
    values, actions = exact.finite_horizon_optimum(MDP, 2)
    plans = itertools.product(itertools.product(range(2), repeat=3), repeat=2)  # an action by state, for each step
    best = np.full(3, -np.inf)
    for first, second in plans:
        last = exact.finite_horizon_values(MDP, np.array(second), 1)[1]
        q = exact.values_of_actions(MDP, last)
        best = np.maximum(best, exact.state_values(q, np.array(first)))
    np.testing.assert_allclose(values[2], best)
    q = exact.values_of_actions(MDP, values[1])
    np.testing.assert_array_equal(actions[1], q.argmax(-1))
    assert values.shape == (3, 3)
    assert actions.shape == (2, 3)
    assert exact.finite_horizon_optimum(MDP, 0)[1].shape == (0, 3)
    with pytest.raises(DataError, match="the horizon is -1"):
        exact.finite_horizon_values(MDP, POLICY, -1)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_returns_of_many_policies(gamma: float) -> None:
    mdp = random_mdp(3, num_states=5, num_actions=2, gamma=gamma, episodic=True)
    rng = np.random.default_rng(0)
    for policies in (rng.dirichlet(np.ones(2), size=(4, 5)), rng.integers(2, size=(4, 5))):
        one_by_one = [exact.expected_return(mdp, policy) for policy in policies]
        np.testing.assert_allclose(exact.expected_returns(mdp, policies), one_by_one, atol=1e-12)


def test_a_policy_that_never_ends_is_counted_up_to_the_horizon() -> None:
    mdp = grid_world(CLIFF, gamma=1.0)
    up = np.zeros(48, dtype=int)
    along = np.where(np.arange(48) == 36, 0, np.where(np.arange(48) == 35, 2, 1))
    assert exact.expected_returns(mdp, np.stack([up, along]), horizon=50).tolist() == [-50, -13]


def test_visited() -> None:
    mdp = grid_world(("S.G", "###", "..."), gamma=0.9)
    assert np.flatnonzero(exact.visited(mdp, np.full((9, 4), 0.25))).tolist() == [0, 1]
    assert np.flatnonzero(exact.visited(mdp, np.zeros(9, dtype=int))).tolist() == [0]
