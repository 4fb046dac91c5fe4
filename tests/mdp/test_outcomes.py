"""Processes from outcomes, from observed steps, and from Gymnasium's tables."""

from __future__ import annotations

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import exact
from trueup.mdp.generators import random_mdp
from trueup.mdp.outcomes import Outcomes, from_gymnasium, from_observed
from trueup.mdp.planning import policy_iteration


def test_the_same_outcome_twice_is_one() -> None:
    """0 leads to 1 by a quarter earning 1 and by a half earning 4: by three quarters, earning 3."""
    several = Outcomes.of([0, 0, 0], 0, [1, 1, 0], [0.25, 0.5, 0.25], [1.0, 4.0, 2.0])
    mdp = several.process(num_states=2, num_actions=1, gamma=0.5, terminal=np.array([False, True]))
    assert mdp.transition_array[0, 0].tolist() == [0.25, 0.75]
    assert mdp.reward_array[0, 0].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("column", "message"), [(0, "there is no state 5"), (1, "there is no action 5"), (2, "there is no next state 5")]
)
def test_what_there_is_not(column: int, message: str) -> None:
    columns: list = [0, 0, 0, 1.0, 0.0]
    columns[column] = [0, 5]
    with pytest.raises(DataError, match=f"outcome 1: {message}"):
        Outcomes.of(*columns).process(num_states=2, num_actions=1, gamma=0.5)


def observe(mdp, num_steps: int, seed: int = 0):
    """Steps from states and actions drawn at random."""
    rng = np.random.default_rng(seed)
    states = rng.choice(np.flatnonzero(~mdp.terminal), size=num_steps)
    actions = rng.integers(mdp.num_actions, size=num_steps)
    cumulated = mdp.transition_array[states, actions].cumsum(-1)
    next_states = np.minimum((rng.random(num_steps)[:, None] > cumulated).sum(-1), mdp.num_states - 1)
    return states, actions, mdp.reward_array[states, actions, next_states], next_states, mdp.terminal[next_states]


def test_observed_often_enough_a_process_is_known() -> None:
    mdp = random_mdp(2, num_states=4, num_actions=2, gamma=0.9, episodic=True)
    num_steps = 200_000
    found = from_observed(*observe(mdp, num_steps), gamma=0.9)
    np.testing.assert_array_equal(found.terminal, mdp.terminal)
    # a share of n ≥ num_steps / 10 draws has a standard error of at most ½/√n
    assert np.abs(found.transition_array - mdp.transition_array).max() < 5 * 0.5 / np.sqrt(num_steps / 10)
    np.testing.assert_allclose(found.reward_array, mdp.reward_array, atol=1e-12)


def test_what_was_never_tried() -> None:
    steps = np.array([0]), np.array([0]), np.array([1.0]), np.array([1]), np.array([True])
    with pytest.raises(DataError, match="state 0, action 1: was never observed"):
        from_observed(*steps, gamma=0.9, num_actions=2)
    found = from_observed(*steps, gamma=0.9, num_actions=2, unseen_reward=-7.0)
    assert exact.action_values(found, np.zeros(3, dtype=int))[0].tolist() == [1, -7]
    assert found.terminal.tolist() == [False, True, True]


def test_an_end_that_is_none() -> None:
    with pytest.raises(DataError, match="step 1: state 1 ends an episode elsewhere"):
        from_observed(
            np.array([0, 1]),
            np.array([0, 0]),
            np.zeros(2),
            np.array([1, 0]),
            np.array([True, False]),
            gamma=0.9,
        )


def test_a_table_of_gymnasium() -> None:
    """State 1 is entered with the episode over, or not; only from the latter one goes on."""
    table = {
        0: {0: [(0.5, 1, 1.0, True), (0.25, 1, 2.0, False), (0.25, 0, 0.0, False)]},
        1: {0: [(1.0, 0, -1.0, False)]},
    }
    environment = SimpleNamespace(unwrapped=SimpleNamespace(P=table, initial_state_distrib=np.array([1.0, 0.0])))
    mdp = from_gymnasium(environment, gamma=0.5)
    assert mdp.transition_array[0, 0].tolist() == [0.25, 0.25, 0.5]
    assert mdp.reward_array[0, 0].tolist() == [0, 2, 1]
    assert mdp.terminal.tolist() == [False, False, True]
    assert mdp.start.tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="no table of its dynamics"):
        from_gymnasium(SimpleNamespace(unwrapped=SimpleNamespace()), gamma=0.5)


@pytest.mark.parametrize(
    ("name", "num_states", "num_actions", "value"),
    [
        ("FrozenLake-v1", 17, 4, 0.542026),
        ("CliffWalking-v1", 49, 4, -(1 - 0.99**13) / 0.01),
        ("Taxi-v4", 501, 6, 6.327464),
    ],
)
def test_the_real_tables(name: str, num_states: int, num_actions: int, value: float) -> None:
    environment = gymnasium.make(name).unwrapped
    mdp = from_gymnasium(environment, gamma=0.99)
    assert (mdp.num_states, mdp.num_actions) == (num_states, num_actions)
    assert np.flatnonzero(mdp.terminal).tolist() == [num_states - 1]
    assert exact.expected_return(mdp, policy_iteration(mdp).policy) == pytest.approx(value, abs=1e-6)
    # What the environment does is what the process says.
    rng = np.random.default_rng(0)
    state, _ = environment.reset(seed=0)
    assert mdp.start[state] > 0
    for action in rng.integers(num_actions, size=300):
        following, reward, terminated, _, _ = environment.step(int(action))
        place = state, action, num_states - 1 if terminated else following
        assert mdp.transition_array[place] > 0
        assert mdp.reward_array[place] == reward
        state = environment.reset()[0] if terminated else following
