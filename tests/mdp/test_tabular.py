"""The exact quantities against hand computation, Bellman's equations, iteration and enumeration; refusals by place."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from trueup.errors import DataError
from trueup.mdp import TabularMDP, enumerate_trajectories, exact, linear, planning
from trueup.mdp.generators import random_mdp
from trueup.mdp.tabular import check_choice


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
    best = planning.policy_iteration(mdp).policy
    assert best[0] == 0
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
        iterated = (policy * (mdp.expected_rewards + mdp.gamma * mdp.transition_array @ iterated)).sum(-1)
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


def test_rewards_may_depend_on_the_next_state_or_not() -> None:
    mdp = PROCESSES[0]
    flat = TabularMDP(transitions=mdp.transitions, rewards=mdp.expected_rewards, start=mdp.start, gamma=mdp.gamma)
    policy = random_policy(mdp)
    np.testing.assert_allclose(exact.values(flat, policy), exact.values(mdp, policy), atol=1e-12)


def test_arrays_are_copied_and_read_only() -> None:
    start = np.array([1.0, 0, 0])
    template = three_states()
    mdp = TabularMDP(
        transitions=template.transition_array,
        rewards=template.reward_array,
        start=start,
        gamma=0.5,
        terminal=template.terminal,
    )
    start[0] = 0.0
    assert mdp.start[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        mdp.transitions.data[0] = 0.5
    with pytest.raises(ValueError, match="read-only"):
        mdp.expected_rewards[0, 0] = 1


def fields_of(mdp: TabularMDP) -> dict:
    """What makes it again, as arrays with all their zeros."""
    return {
        "transitions": mdp.transition_array,
        "rewards": mdp.reward_array,
        "start": mdp.start.copy(),
        "gamma": mdp.gamma,
        "terminal": mdp.terminal.copy(),
    }


def by_action(array: np.ndarray) -> list[sparse.csr_array]:
    return [sparse.csr_array(array[:, action]) for action in range(array.shape[1])]


def by_row(array: np.ndarray) -> sparse.coo_array:
    return sparse.coo_array(array.reshape(-1, array.shape[2]))


@pytest.mark.parametrize("form", [by_row, by_action])
@pytest.mark.parametrize("mdp", PROCESSES, ids=lambda mdp: f"gamma{mdp.gamma}")
def test_sparse_or_dense_is_the_same_process(mdp: TabularMDP, form) -> None:
    fields = fields_of(mdp)
    same = TabularMDP(**(fields | {"transitions": form(fields["transitions"]), "rewards": form(fields["rewards"])}))
    for name, array in fields.items():
        np.testing.assert_array_equal(fields_of(same)[name], array)
    np.testing.assert_array_equal(same.expected_rewards, mdp.expected_rewards)
    np.testing.assert_allclose(same.expected_rewards, (mdp.transition_array * mdp.reward_array).sum(-1), atol=1e-15)


def test_rewards_of_states_are_earned_on_leaving_them() -> None:
    fields = fields_of(three_states()) | {"rewards": np.array([1.0, 2.0, 3.0])}
    assert TabularMDP(**fields).expected_rewards.tolist() == [[1, 1], [2, 2], [0, 0]]


def test_an_episode_may_begin_anywhere_unless_told() -> None:
    fields = fields_of(three_states())
    del fields["start"]
    assert TabularMDP(**fields).start.tolist() == [0.5, 0.5, 0]


def test_a_policy_of_actions_is_one_of_certainties() -> None:
    mdp = PROCESSES[0]
    actions = np.array([2, 0, 1, 1])
    for quantity in (exact.values, exact.action_values, exact.advantages, exact.occupancy):
        np.testing.assert_allclose(quantity(mdp, actions), quantity(mdp, np.eye(3)[actions]), atol=1e-13)


def broken(**changes) -> TabularMDP:
    fields = fields_of(three_states())
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
        ({"rewards": lambda r: r[:2]}, r"rewards have the shape \(2, 2, 3\), expected \(3,\), \(3, 2\) or \(3, 2, 3\)"),
        ({"start": lambda s: s[:2]}, r"start has the shape \(2,\), expected \(3,\)"),
        ({"terminal": lambda s: s[:2]}, r"terminal has the shape \(2,\), expected \(3,\)"),
    ],
)
def test_what_is_not_a_process_is_refused_with_the_place(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        broken(**changes)


def test_policies_are_checked() -> None:
    mdp = three_states()
    with pytest.raises(DataError, match=r"the policy has the shape \(2, 2\), expected \(3, 2\) or \(3,\)"):
        exact.values(mdp, uniform(mdp)[:2])
    with pytest.raises(DataError, match="policy in state 1: there is no action 2"):
        exact.values(mdp, np.array([0, 2, 0]))
    with pytest.raises(DataError, match="the policy's actions are float64"):
        exact.values(mdp, np.zeros(3))
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


def test_a_choice_that_there_is_not() -> None:
    check_choice("method", "lu", linear.Method)
    with pytest.raises(DataError, match=r"method is 'qr'\n  → choose one of auto, dense, lu, krylov"):
        check_choice("method", "qr", linear.Method)
