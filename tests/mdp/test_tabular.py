"""The exact quantities against hand computation, Bellman's equations, iteration and enumeration; refusals by place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import TabularMDP, enumerate_trajectories
from trueup.mdp import tabular as exact
from trueup.mdp.random import random_mdp


def three_states(gamma: float = 0.5) -> TabularMDP:
    """State 0: action 0 leads to 1 and earns 1, action 1 ends. State 1: both end and earn 2. State 2 is terminal."""
    transitions, rewards = np.zeros((3, 2, 3)), np.zeros((3, 2))
    transitions[0, 0, 1] = transitions[0, 1, 2] = transitions[1, :, 2] = 1
    rewards[0, 0], rewards[1] = 1, 2
    return TabularMDP(
        transitions=transitions, rewards=rewards, start=np.array([1.0, 0, 0]), gamma=gamma, terminal=np.arange(3) == 2
    )


def uniform(mdp: TabularMDP) -> np.ndarray:
    return np.full((mdp.num_states, mdp.num_actions), 1 / mdp.num_actions)


def random_policy(mdp: TabularMDP, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(mdp.num_actions), size=mdp.num_states)


def test_golden() -> None:
    mdp = three_states()
    policy = uniform(mdp)
    # V(1) = 2; Q(0, ·) = 1 + ½·2, 0; V(0) = 1
    np.testing.assert_allclose(exact.values(mdp, policy), [1, 2, 0])
    np.testing.assert_allclose(exact.action_values(mdp, policy), [[2, 0], [2, 2], [0, 0]])
    np.testing.assert_allclose(exact.advantages(mdp, policy), [[1, -1], [0, 0], [0, 0]])
    # state 1 is reached half the time, one step late; the end a quarter by way of it (discounted) and half at once
    np.testing.assert_allclose(exact.occupancy(mdp, policy), [1, 0.25, 0.375])
    np.testing.assert_allclose(exact.occupancy(mdp, policy, discounted=False), [1, 0.5, 1])
    assert exact.expected_return(mdp, policy) == pytest.approx(1)
    best = exact.optimal_policy(mdp)
    assert best[0].tolist() == [1, 0]
    assert exact.expected_return(mdp, best) == pytest.approx(2)


PROCESSES = [
    random_mdp(seed, num_states=4, num_actions=3, gamma=gamma, episodic=episodic)
    for seed, gamma, episodic in [(0, 0.9, False), (1, 0.3, False), (2, 0.9, True), (3, 1.0, True), (4, 0.0, True)]
]


@pytest.mark.parametrize("mdp", PROCESSES, ids=lambda mdp: f"gamma{mdp.gamma}")
def test_identities(mdp: TabularMDP) -> None:
    policy = random_policy(mdp)
    values, q = exact.values(mdp, policy), exact.action_values(mdp, policy)
    live = ~mdp.terminal
    np.testing.assert_allclose((policy * q).sum(-1)[live], values[live], atol=1e-12)
    np.testing.assert_allclose((policy * exact.advantages(mdp, policy)).sum(-1), 0, atol=1e-12)
    assert (values[mdp.terminal] == 0).all()
    # the same return from the front and from the back: ρ·V = d·R
    visits = exact.occupancy(mdp, policy)
    rewards = (policy * mdp.expected_rewards).sum(-1)
    assert visits @ rewards == pytest.approx(exact.expected_return(mdp, policy), abs=1e-12)
    if mdp.gamma < 1 and live.all():
        assert visits.sum() == pytest.approx(1 / (1 - mdp.gamma))
    # iterating Bellman's equation, which contracts (or ends, where episodes do), arrives at the same values
    iterated = np.zeros(mdp.num_states)
    for _ in range(400):
        iterated = (policy * (mdp.expected_rewards + mdp.gamma * mdp.transitions @ iterated)).sum(-1)
    np.testing.assert_allclose(iterated, values, atol=1e-12)


@pytest.mark.parametrize("mdp", [mdp for mdp in PROCESSES if mdp.terminal.any()], ids=lambda mdp: f"gamma{mdp.gamma}")
def test_enumeration_agrees(mdp: TabularMDP) -> None:
    """Return and visits, as sums over every trajectory."""
    policy = random_policy(mdp)
    paths = enumerate_trajectories(mdp, policy, horizon=3)
    weights = paths.probabilities[:, None] * mdp.gamma ** np.arange(3) * paths.mask
    assert (weights * paths.rewards).sum() == pytest.approx(exact.expected_return(mdp, policy), abs=1e-12)
    for discounted, weight in ((True, weights), (False, paths.probabilities[:, None] * paths.mask)):
        visits = np.bincount(paths.states.ravel(), weight.ravel(), minlength=4)
        expected = exact.occupancy(mdp, policy, discounted=discounted)
        np.testing.assert_allclose(visits[~mdp.terminal], expected[~mdp.terminal], atol=1e-12)


@pytest.mark.parametrize("mdp", PROCESSES, ids=lambda mdp: f"gamma{mdp.gamma}")
def test_optimal_policy_beats_every_deterministic_one(mdp: TabularMDP) -> None:
    best = exact.values(mdp, exact.optimal_policy(mdp))
    for actions in itertools.product(range(3), repeat=4):
        assert (exact.values(mdp, np.eye(3)[list(actions)]) <= best + 1e-12).all()


def test_ties_do_not_go_round_for_ever() -> None:
    mdp = random_mdp(0, num_states=3, num_actions=4, gamma=0.9, episodic=False)
    same = TabularMDP(
        transitions=mdp.transitions[:, [0, 0, 0, 0]],
        rewards=np.full((3, 4), 0.1),
        start=mdp.start,
        gamma=0.9,
    )
    np.testing.assert_allclose(exact.values(same, exact.optimal_policy(same)), 1.0)


def test_rewards_may_depend_on_the_next_state_or_not() -> None:
    mdp = PROCESSES[0]
    flat = TabularMDP(transitions=mdp.transitions, rewards=mdp.expected_rewards, start=mdp.start, gamma=mdp.gamma)
    policy = random_policy(mdp)
    np.testing.assert_allclose(exact.values(flat, policy), exact.values(mdp, policy), atol=1e-12)


def test_arrays_are_copied_and_read_only() -> None:
    start = np.array([1.0, 0, 0])
    template = three_states()
    mdp = TabularMDP(
        transitions=template.transitions,
        rewards=template.rewards,
        start=start,
        gamma=0.5,
        terminal=template.terminal,
    )
    start[0] = 0.0
    assert mdp.start[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        mdp.transitions[0, 0, 0] = 1


def broken(**changes) -> TabularMDP:
    mdp = three_states()
    fields = {name: getattr(mdp, name).copy() for name in ("transitions", "rewards", "start", "terminal")}
    fields["gamma"] = mdp.gamma
    for name, change in changes.items():
        fields[name] = change(fields[name])
    return TabularMDP(**fields)


def put(*index: int, value: float):
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transitions": put(1, 0, 2, value=0.9)}, "state 1, action 0: probabilities add up to 0.9"),
        ({"transitions": put(0, 1, 2, value=-1.0)}, "state 0, action 1: not probabilities"),
        ({"transitions": put(0, 1, 2, value=np.nan)}, "state 0, action 1: not probabilities"),
        ({"transitions": put(2, 1, 0, value=1.0)}, "state 2, action 1: a terminal state has transitions or rewards"),
        ({"rewards": put(2, 0, 0, value=1.0)}, "state 2, action 0: a terminal state has transitions or rewards"),
        ({"rewards": put(1, 1, 2, value=np.inf)}, "state 1, action 1: a reward is not a finite number"),
        ({"start": put(0, value=0.5)}, "start: probabilities add up to 0.5"),
        ({"gamma": lambda gamma: 1.5}, "gamma is 1.5"),
        ({"transitions": lambda p: p[:, :, :2]}, r"transitions have the shape \(3, 2, 2\)"),
        ({"rewards": lambda r: r[:2]}, r"rewards has the shape \(2, 2, 3\), expected \(3, 2, 3\)"),
        ({"start": lambda s: s[:2]}, r"start has the shape \(2,\), expected \(3,\)"),
        ({"terminal": lambda s: s[:2]}, r"terminal has the shape \(2,\), expected \(3,\)"),
    ],
)
def test_what_is_not_a_process_is_refused_with_the_place(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        broken(**changes)


def test_policies_are_checked() -> None:
    mdp = three_states()
    with pytest.raises(DataError, match=r"the policy has the shape \(2, 2\), expected \(3, 2\)"):
        exact.values(mdp, uniform(mdp)[:2])
    policy = uniform(mdp)
    policy[1, 0] = 0.6
    with pytest.raises(DataError, match=r"policy in state 1: probabilities add up to 1\.1"):
        exact.values(mdp, policy)


def test_undiscounted_sums_over_endless_episodes_are_refused() -> None:
    endless = random_mdp(0, num_states=3, num_actions=2, gamma=1.0, episodic=False)
    with pytest.raises(DataError, match="state 0: under this policy the episode never ends"):
        exact.values(endless, uniform(endless))
    discounted = random_mdp(0, num_states=3, num_actions=2, gamma=0.9, episodic=False)
    with pytest.raises(DataError, match="never ends"):
        exact.occupancy(discounted, uniform(discounted), discounted=False)
    # It's the policy that decides: here action 1 stays where it is, action 0 ends.
    transitions = np.zeros((2, 2, 2))
    transitions[0, 0, 1] = transitions[0, 1, 0] = 1
    loop = TabularMDP(
        transitions=transitions,
        rewards=np.array([[1.0, 1.0], [0.0, 0.0]]),
        start=np.array([1.0, 0.0]),
        gamma=1.0,
        terminal=np.array([False, True]),
    )
    assert exact.expected_return(loop, uniform(loop)) == pytest.approx(2)
    with pytest.raises(DataError, match="state 0"):
        exact.values(loop, np.array([[0.0, 1.0], [0.5, 0.5]]))
