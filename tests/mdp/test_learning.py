"""Q-learning and its kin against the values they converge to; what tells them apart; policies by their gradient."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.errors import DataError
from trueup.mdp import TabularMDP, exact
from trueup.mdp.estimation import StepSize
from trueup.mdp.generators import CLIFF, grid_world, random_mdp
from trueup.mdp.learning import Exploration, greedy_but, learn_action_values
from trueup.mdp.planning import best_exploring, policy_iteration
from trueup.mdp.policy_learning import actor_critic, exact_returns, reinforce

ENDLESS = random_mdp(1, num_states=3, num_actions=2, gamma=0.7, episodic=False)
EPISODIC = random_mdp(3, num_states=4, num_actions=2, gamma=0.9, episodic=True)
STEADY = Exploration(first=0.3, last=0.3)
METHODS = ["sarsa", "expected_sarsa", "q_learning", "double_q_learning"]


@pytest.mark.parametrize("mdp", [ENDLESS, EPISODIC], ids=["endless", "episodic"])
@pytest.mark.parametrize("method", METHODS)
def test_values_of_actions_converge(method, mdp: TabularMDP) -> None:
    """To those of the greedy policy off-policy, to those of the ε-greedy one on-policy; within the runs' own error."""
    on_policy = method.endswith("sarsa")
    truth = best_exploring(mdp, 0.3) if on_policy else best_exploring(mdp, 0.0)
    found = learn_action_values(
        mdp, method=method, num_steps=3_000, num_runs=100, exploration=STEADY, step_size=StepSize(power=0.7), seed=4
    )
    live = ~mdp.terminal
    errors = found.errors
    off = np.abs(found.mean - truth)
    assert (off <= 4.5 * errors + 0.02 * np.abs(truth).max())[live].all()
    assert np.abs(best_exploring(mdp, 0.3) - best_exploring(mdp, 0.0))[live].max() > 0.04 * np.abs(truth).max()
    assert not found.final[:, ~live].any()
    assert found.distances(truth)[-1].mean() < found.distances(truth)[0].mean()


def test_greedy_but() -> None:
    rng = np.random.default_rng(0)
    rows = greedy_but(np.array([[1.0, 3.0, 2.0]] * 2), 0.3, rng)
    np.testing.assert_allclose(rows, [[0.1, 0.8, 0.1]] * 2)
    tied = greedy_but(np.zeros((3000, 3)), 0.0, rng)
    assert (np.abs(tied.mean(0) - 1 / 3) < 4.5 * np.sqrt(2 / 9 / 3000)).all()


def test_exploration_falls_along_a_line() -> None:
    falling = Exploration(first=1.0, last=0.2, share=0.5)
    assert [falling.at(number, 100) for number in (0, 25, 50, 100)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert Exploration(first=1.0, last=0.1, share=0.0).at(1, 100) == pytest.approx(0.1)
    with pytest.raises(DataError, match="choose all three"):
        Exploration(first=1.1)


def test_sarsa_keeps_away_from_the_cliff() -> None:
    """Sutton & Barto's example 6.6: with ε 0.1 Q-learning learns of the edge, SARSA of the way around."""
    mdp = grid_world(CLIFF, gamma=1.0)
    options = {"num_steps": 8_000, "num_runs": 10, "step_size": StepSize(initial=0.5, power=0.0)}
    options |= {"exploration": Exploration(first=0.1, last=0.1), "num_looks": 1, "seed": 0}

    def lowest_row(method) -> float:
        """Share of runs whose greedy way goes along the edge."""
        q = learn_action_values(mdp, method=method, **options).final
        near = 0
        for run in q:
            cell, seen = 36, []
            while not mdp.terminal[cell] and len(seen) < 50:
                cell = int(mdp.transition_array[cell, run[cell].argmax()].argmax())
                seen.append(cell)
            near += sum(24 <= each < 36 for each in seen) >= 10
        return near / len(q)

    assert lowest_row("q_learning") >= 0.8
    assert lowest_row("sarsa") <= 0.3


def test_q_learning_hopes_too_much_and_double_less() -> None:
    """One state, 20 actions of mean reward −0.1 and much noise: the maximum of estimates is far above −0.1."""
    num = 20
    transitions, rewards = np.zeros((4, num, 4)), np.zeros((4, num, 4))
    transitions[0, :, 1] = 1.0
    transitions[1, :, 2] = transitions[1, :, 3] = 0.5
    rewards[1, :, 2], rewards[1, :, 3] = 0.9, -1.1
    noisy = TabularMDP(
        transitions=transitions, rewards=rewards, start=np.eye(4)[0], gamma=1.0, terminal=np.array([0, 0, 1, 1], bool)
    )

    def hoped(method) -> float:
        options = {"num_steps": 800, "num_runs": 100, "exploration": Exploration(first=1.0, last=1.0)}
        return learn_action_values(noisy, method=method, **options).final[:, 0].max(-1).mean()

    assert hoped("q_learning") > hoped("double_q_learning") + 0.1
    assert hoped("q_learning") > 0.1


# --- policies


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_reinforce_finds_the_best_policy(baseline) -> None:
    best = exact.expected_return(EPISODIC, policy_iteration(EPISODIC).policy)
    first = exact.expected_return(EPISODIC, np.full((4, 2), 0.5))
    found = reinforce(EPISODIC, num_updates=400, num_runs=6, baseline=baseline, num_looks=4, seed=1)
    returns = exact_returns(EPISODIC, found)
    assert returns.shape == (4, 6)
    assert (returns[-1] > best - 0.1 * (best - first)).all()
    assert (returns[-1] <= best + 1e-12).all()
    length = exact.occupancy(EPISODIC, policy_iteration(EPISODIC).policy, discounted=False)[:3].sum()
    assert found.steps[-1] - found.steps[-2] == pytest.approx(100 * 8 * length, rel=0.1)


def test_a_baseline_lowers_the_spread_of_a_step() -> None:
    """After one update from the same policy, logits of many runs differ less where returns, all high, are compared."""
    generous = TabularMDP(
        transitions=EPISODIC.transition_array,
        rewards=EPISODIC.reward_array + 3.0 * (EPISODIC.transition_array > 0),
        start=EPISODIC.start,
        gamma=EPISODIC.gamma,
        terminal=EPISODIC.terminal,
    )

    def spread(baseline) -> float:
        found = reinforce(
            generous, num_updates=1, num_runs=2000, episodes_per_update=4, baseline=baseline, learning_rate=0.1
        )
        return np.log(found.final[:, :3]).var(0).sum()

    assert spread("mean") < 0.9 * spread("none")


@pytest.mark.parametrize("discount_in_front", [True, False])
def test_the_mean_step_is_the_gradient(discount_in_front: bool) -> None:
    from torch import zeros

    from trueup.mdp import softmax

    logits = zeros(4, 2).double()
    gradient = softmax.policy_gradient if discount_in_front else softmax.dropped_discount_gradient
    expected = gradient(EPISODIC, logits).numpy()
    rate, num = 1e-3, 20_000
    found = reinforce(
        EPISODIC,
        num_updates=1,
        num_runs=num,
        episodes_per_update=1,
        baseline="none",
        learning_rate=rate,
        discount_in_front=discount_in_front,
    )
    moved = np.log(found.final)
    steps = (moved - moved.mean(-1, keepdims=True)) / rate  # softmax keeps logits but for a shift; steps add up to 0
    error = steps.std(0, ddof=1) / np.sqrt(num)
    assert (np.abs(steps.mean(0) - expected) <= 4.5 * error + 1e-3).all()


@pytest.mark.parametrize("mdp", [ENDLESS, EPISODIC], ids=["endless", "episodic"])
def test_actor_critic_finds_the_best_policy(mdp: TabularMDP) -> None:
    best = exact.expected_return(mdp, policy_iteration(mdp).policy)
    first = exact.expected_return(mdp, np.full((mdp.num_states, 2), 0.5))
    found = actor_critic(mdp, num_steps=3000, num_runs=6, learning_rate=0.4, num_looks=2, seed=1)
    returns = exact_returns(mdp, found)
    assert (returns[-1] > best - 0.1 * (best - first)).all()
    with_discount = actor_critic(mdp, num_steps=500, num_runs=6, learning_rate=0.4, discount_in_front=True, seed=1)
    assert exact_returns(mdp, with_discount)[-1].mean() > first


def test_endless_episodes_have_no_returns() -> None:
    with pytest.raises(DataError, match="cut off at 20 steps"):
        reinforce(ENDLESS, num_updates=1, horizon=20)
