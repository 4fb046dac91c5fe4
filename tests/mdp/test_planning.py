"""All planners against each other, against every policy there is, and their bounds against the truth."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import TabularMDP, exact
from trueup.mdp.generators import CLIFF, chain, garnet, grid_world, random_mdp
from trueup.mdp.planning import (
    Solution,
    best_exploring,
    linear_program,
    modified_policy_iteration,
    policy_iteration,
    value_iteration,
)

PLANNERS: list[Callable[..., Solution]] = [
    value_iteration,
    modified_policy_iteration,
    policy_iteration,
    linear_program,
]
PROCESSES = [
    random_mdp(seed, num_states=4, num_actions=3, gamma=gamma, episodic=episodic)
    for seed, gamma, episodic in [(0, 0.9, False), (1, 0.3, False), (2, 0.9, True), (3, 1.0, True), (4, 0.0, True)]
]


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("mdp", PROCESSES, ids=lambda mdp: f"gamma{mdp.gamma}")
def test_no_policy_is_better(mdp: TabularMDP, planner: Callable[..., Solution]) -> None:
    found = planner(mdp)
    every = [exact.values(mdp, np.array(actions)) for actions in itertools.product(range(3), repeat=4)]
    best = np.max(every, axis=0)
    np.testing.assert_allclose(found.values, best, rtol=0, atol=1e-6)
    np.testing.assert_allclose(exact.values(mdp, found.policy), best, rtol=0, atol=1e-5)
    assert found.policy[mdp.terminal].sum() == 0


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-9])
@pytest.mark.parametrize("planner", [value_iteration, modified_policy_iteration])
@pytest.mark.parametrize("gamma", [0.5, 0.99])
def test_the_bounds_hold(planner: Callable[..., Solution], tolerance: float, gamma: float) -> None:
    for mdp in (
        garnet(1, num_states=60, num_actions=4, num_successors=3, gamma=gamma),
        grid_world(CLIFF, gamma=gamma, slip=0.1),
        random_mdp(5, num_states=30, num_actions=3, gamma=gamma, episodic=True),
    ):
        optimum = exact.values(mdp, policy_iteration(mdp).policy)
        found = planner(mdp, tolerance=tolerance)
        assert found.error <= tolerance
        assert np.abs(found.values - optimum).max() <= found.error + 1e-11
        loss = optimum - exact.values(mdp, found.policy)
        assert loss.min() >= -1e-11
        assert loss.max() <= found.regret + 1e-11


def test_without_a_discount_there_is_no_bound() -> None:
    mdp = grid_world(CLIFF, gamma=1.0)
    for planner in (value_iteration, modified_policy_iteration):
        found = planner(mdp)
        assert np.isnan(found.error)
        assert np.isnan(found.regret)
        assert found.residual <= 1e-6
        # up, eleven to the right, down
        assert found.values.reshape(4, 12)[3, 0] == pytest.approx(-13)


def test_a_policy_is_followed_while_that_tells_much() -> None:
    """Fewer sweeps over all actions than value iteration, and told of each."""
    mdp = grid_world(["S" + "." * 18 + "G"], gamma=0.99, slip=0.2)
    told: list[tuple[int, float]] = []
    modified = modified_policy_iteration(mdp, progress=lambda *now: told.append(now))
    plain = value_iteration(mdp)
    assert modified.sweeps < plain.sweeps / 5
    assert [number for number, _ in told] == list(range(1, modified.sweeps + 1))
    assert told[-1][1] == modified.error


def test_ties_do_not_go_round_for_ever() -> None:
    """Every state has a twin, and each action is there twice, leading to one or the other with chances of its own:
    equal in value, not in floating point. By the largest of the computed values alone nearly all of these go round."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        single, earned = rng.dirichlet(np.ones(6), size=(6, 3)), rng.normal(size=(6, 3))
        share = rng.random((12, 6, 6))
        doubled = single.repeat(2, 0).repeat(2, 1)
        transitions = np.stack([doubled * share, doubled * (1 - share)], -1).reshape(12, 6, 12)
        mdp = TabularMDP(transitions=transitions, rewards=earned.repeat(2, 0).repeat(2, 1), gamma=0.99)
        found = policy_iteration(mdp, max_sweeps=30)
        held = exact.values(mdp, found.policy)
        np.testing.assert_allclose(found.values, modified_policy_iteration(mdp).values, atol=1e-5)
        assert (found.values - held <= found.regret + found.error).all()


def test_what_float64_can_not_bound_is_said() -> None:
    long = chain(np.linspace(0, 100, 60).tolist(), left=0.4, right=0.4, gamma=0.9999)
    for planner in (value_iteration, modified_policy_iteration):
        with pytest.raises(DataError, match="float64 says nothing below"):
            planner(long, tolerance=1e-7)
        assert planner(long, tolerance=1e-4).error <= 1e-4
        for tolerance in (0.0, -1.0, np.nan):
            with pytest.raises(DataError, match="tolerance is"):
                planner(long, tolerance=tolerance)


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_policy_that_goes_round_for_nothing_is_no_answer(planner: Callable[..., Solution]) -> None:
    """To stay costs nothing, to leave costs 1: without a discount staying for ever has the better sum, and no end."""
    transitions = np.zeros((2, 2, 2))
    transitions[0, 0, 0] = transitions[0, 1, 1] = 1.0
    loop = TabularMDP(
        transitions=transitions, rewards=np.array([[0.0, -1.0], [0, 0]]), gamma=1.0, terminal=np.array([False, True])
    )
    with pytest.raises(DataError, match="the episode never ends"):
        planner(loop)


def test_what_has_no_end_is_said() -> None:
    endless = random_mdp(0, num_states=3, num_actions=2, gamma=1.0, episodic=False)
    with pytest.raises(DataError, match="not within 1e-06 after 50 sweeps"):
        value_iteration(endless, max_sweeps=50)
    with pytest.raises(DataError, match="the episode never ends"):
        policy_iteration(endless)
    with pytest.raises(DataError, match="the linear program has no solution"):
        linear_program(endless)
    with pytest.raises(DataError, match="still improving after 1 policies"):
        policy_iteration(PROCESSES[0], max_sweeps=1)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_the_best_that_explores(epsilon: float, gamma: float) -> None:
    """No ε-greedy policy has a higher value in any state, and one of them has these."""
    mdp = random_mdp(5, num_states=4, num_actions=2, gamma=gamma, episodic=True)
    values = np.stack(
        [
            exact.values(mdp, epsilon / 2 + (1 - epsilon) * np.eye(2)[list(actions)])
            for actions in itertools.product(range(2), repeat=4)
        ]
    )
    q = best_exploring(mdp, epsilon)
    np.testing.assert_allclose(q, exact.values_of_actions(mdp, values.max(0)), atol=1e-6)
    assert np.isclose(values, values.max(0)).all(-1).any()
    with pytest.raises(DataError, match=r"epsilon is 1\.1"):
        best_exploring(mdp, 1.1)
