"""What is drawn is what the process says, to within what so many draws can say."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import TabularMDP, enumerate_trajectories, exact
from trueup.mdp.generators import garnet, random_mdp
from trueup.mdp.sampling import Runs, Sampler, sample_trajectories

MDP = random_mdp(2, num_states=4, num_actions=2, gamma=0.9, episodic=True)
POLICY = np.random.default_rng(0).dirichlet(np.ones(2), size=4)
STANDARD_ERRORS = 4.5  # of some hundred comparisons hardly one goes beyond


def assert_shares(counts: np.ndarray, probabilities: np.ndarray) -> None:
    total = counts.sum()
    error = np.sqrt(probabilities * (1 - probabilities) / total)
    assert (np.abs(counts / total - probabilities) <= STANDARD_ERRORS * error + 1e-12).all()


def test_first_states_actions_and_next_states() -> None:
    sampler = Sampler(MDP, np.random.default_rng(0))
    num = 100_000
    assert_shares(np.bincount(sampler.first_states(num), minlength=4), MDP.start)
    for state in range(3):
        actions = sampler.actions(POLICY, np.full(num, state))
        assert_shares(np.bincount(actions, minlength=2), POLICY[state])
        for action in range(2):
            taken = sampler.steps(np.full(num, state), np.full(num, action))
            assert_shares(np.bincount(taken.next_states, minlength=4), MDP.transition_array[state, action])
            np.testing.assert_array_equal(taken.rewards, MDP.reward_array[state, action, taken.next_states])
            np.testing.assert_array_equal(taken.terminated, MDP.terminal[taken.next_states])


def test_in_a_large_process_no_step_leads_elsewhere() -> None:
    mdp = garnet(0, num_states=20_000, num_actions=3, num_successors=4, gamma=0.9)
    sampler, rng = Sampler(mdp, np.random.default_rng(0)), np.random.default_rng(1)
    states, actions = rng.integers(20_000, size=50_000), rng.integers(3, size=50_000)
    taken = sampler.steps(states, actions)
    assert (np.asarray(mdp.transitions[states * 3 + actions, taken.next_states]) > 0).all()


def test_a_policy_of_actions() -> None:
    states = np.array([0, 1, 2, 1])
    assert Sampler(MDP, np.random.default_rng(0)).actions(np.array([1, 0, 1, 0]), states).tolist() == [1, 0, 1, 0]


def test_trajectories_come_as_often_as_they_are_likely() -> None:
    every = enumerate_trajectories(MDP, POLICY, horizon=3)
    drawn = sample_trajectories(MDP, POLICY, num_trajectories=50_000, horizon=3)

    def names(paths) -> list[tuple]:
        return [
            tuple(zip(s[m], a[m], n[m], strict=True))
            for s, a, n, m in zip(paths.states, paths.actions, paths.next_states, paths.mask, strict=True)
        ]

    number = {name: index for index, name in enumerate(names(every))}
    assert_shares(np.bincount([number[name] for name in names(drawn)], minlength=len(every)), every.probabilities)
    assert drawn.probabilities.sum() == pytest.approx(1)
    returns = (drawn.rewards * 0.9 ** np.arange(drawn.rewards.shape[1])).sum(-1)
    error = returns.std() / np.sqrt(len(returns))
    assert abs(returns.mean() - exact.expected_return(MDP, POLICY)) <= STANDARD_ERRORS * error


def test_cut_off_at_the_horizon() -> None:
    endless = random_mdp(0, num_states=3, num_actions=2, gamma=0.9, episodic=False)
    drawn = sample_trajectories(endless, np.zeros(3, dtype=int), num_trajectories=5, horizon=7)
    assert drawn.mask.all()
    assert not drawn.terminated.any()
    assert drawn.truncated[:, -1].all()
    assert not drawn.truncated[:, :-1].any()
    one = sample_trajectories(MDP, POLICY, num_trajectories=200, horizon=1)
    np.testing.assert_array_equal(one.truncated, ~one.terminated)
    with pytest.raises(DataError, match="the horizon is 0"):
        sample_trajectories(MDP, POLICY, num_trajectories=5, horizon=0)


def begins_at_its_end() -> TabularMDP:
    return TabularMDP(
        transitions=MDP.transition_array,
        rewards=MDP.reward_array,
        start=np.array([0.5, 0, 0, 0.5]),
        gamma=0.9,
        terminal=MDP.terminal,
    )


def test_episodes_without_a_step() -> None:
    drawn = sample_trajectories(begins_at_its_end(), POLICY, num_trajectories=1000, horizon=5)
    assert 0 < (~drawn.mask.any(-1)).sum() < 1000
    with pytest.raises(DataError, match="an episode can begin in a terminal state"):
        Runs(begins_at_its_end(), 2, seed=0)


def test_runs_begin_anew_after_an_end() -> None:
    runs = Runs(MDP, 1000, seed=0)
    for _ in range(10):
        before = runs.states
        assert not MDP.terminal[before].any()
        taken = runs.step(np.zeros(1000, dtype=int))
        np.testing.assert_array_equal(taken.states, before)
        np.testing.assert_array_equal(runs.states[~taken.terminated], taken.next_states[~taken.terminated])
        assert (MDP.start[runs.states[taken.terminated]] > 0).all()
