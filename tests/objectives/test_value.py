"""Value losses and targets: goldens, minimisers, and Bellman's equations as exact expectations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trueup.mdp import TabularMDP, exact, planning
from trueup.mdp.generators import random_mdp
from trueup.objectives.value import (
    clipped_value_loss,
    double_q_learning_target,
    expected_sarsa_target,
    explained_variance,
    huber_value_loss,
    q_learning_target,
    sarsa_target,
    td_target,
    value_loss,
)


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_losses_golden() -> None:
    assert value_loss(t(3, 1), t(1, 1)).tolist() == [2, 0]
    # old value 0, clip 1: the value 3 counts as 1 if that is worse: target 5: ½·(1−5)² = 8 > ½·(3−5)² = 2;
    # target 0: ½·3² > ½·1²; inside the range both are the same
    assert clipped_value_loss(t(3, 3, 0.5), t(0, 0, 0), t(5, 0, 1), clip=1.0).tolist() == [8, 4.5, 0.125]
    assert clipped_value_loss(t(-3, -3), t(0, 0), t(-5, 0), clip=1.0).tolist() == [8, 4.5]
    assert clipped_value_loss(t(3, 3), t(1, 1), t(5, 0), clip=0.0).tolist() == [8, 4.5]
    assert huber_value_loss(t(0.5, 3, -3), t(0, 0, 0), delta=1.0).tolist() == [0.125, 2.5, 2.5]
    assert huber_value_loss(t(3), t(0), delta=2.0).tolist() == [4]


def test_explained_variance_golden() -> None:
    returns = torch.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=torch.float64)  # variance 5
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 4, returns) == 1
    assert explained_variance(torch.full_like(returns, 9), returns) == 0
    assert explained_variance(returns / 2, returns) == 0.75
    assert explained_variance(-returns, returns) == -3
    assert explained_variance(returns, torch.full_like(returns, 9)) == 0
    with pytest.raises(ValueError, match="targets"):
        explained_variance.__wrapped__(returns, returns[0])


def test_targets_golden() -> None:
    rewards, discounts = t(1, 1), t(0.5, 0)  # the second step terminates
    next_q = torch.tensor([[2.0, 6.0], [9.0, 9.0]], dtype=torch.float64)
    other_q = torch.tensor([[10.0, 4.0], [9.0, 9.0]], dtype=torch.float64)
    assert td_target(rewards, discounts, t(4, 9)).tolist() == [3, 1]
    assert q_learning_target(rewards, discounts, next_q).tolist() == [4, 1]
    # one selects action 1, the other one says it is worth 4
    assert double_q_learning_target(rewards, discounts, next_q, other_q).tolist() == [3, 1]
    assert sarsa_target(rewards, discounts, next_q, torch.tensor([0, 1])).tolist() == [2, 1]
    probs = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    assert expected_sarsa_target(rewards, discounts, next_q, probs).tolist() == [3.5, 1]


def test_illegal_actions_are_not_the_maximum() -> None:
    next_q, legal = torch.tensor([[2.0, 6.0]]), torch.tensor([[True, False]])
    assert q_learning_target(torch.ones(1), torch.ones(1), next_q, legal).tolist() == [3]
    assert double_q_learning_target(torch.ones(1), torch.ones(1), next_q, 10 * next_q, legal).tolist() == [21]
    # a terminal next state may offer none
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    assert q_learning_target(torch.ones(1), torch.zeros(1), next_q, nothing).tolist() == [1]


def test_identities() -> None:
    """With the greedy policy expected SARSA is Q-learning; with one and the same estimate, double Q-learning too."""
    rewards, discounts = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    next_q = torch.randn(6, 3, dtype=torch.float64)
    greedy = torch.nn.functional.one_hot(next_q.argmax(-1), 3).double()
    expected = q_learning_target(rewards, discounts, next_q)
    torch.testing.assert_close(expected_sarsa_target(rewards, discounts, next_q, greedy), expected)
    torch.testing.assert_close(sarsa_target(rewards, discounts, next_q, next_q.argmax(-1)), expected)
    torch.testing.assert_close(td_target(rewards, discounts, next_q.amax(-1)), expected)
    values, returns = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(huber_value_loss(values, returns, delta=1e6), value_loss(values, returns))
    torch.testing.assert_close(clipped_value_loss(values, values, returns, clip=0.1), value_loss(values, returns))
    torch.testing.assert_close(clipped_value_loss(values, returns, returns, clip=1e6), value_loss(values, returns))


def test_gradients() -> None:
    values = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    old, returns = torch.randn(2, 2, 5, dtype=torch.float64)
    for loss in (
        lambda v: value_loss(v, returns),
        lambda v: clipped_value_loss(v, old, returns, clip=0.3),
        lambda v: huber_value_loss(v, returns, delta=0.7),
    ):
        assert torch.autograd.gradcheck(loss, values)
    (gradient,) = torch.autograd.grad(value_loss(values, returns).sum(), values)
    torch.testing.assert_close(gradient, values.detach() - returns)
    (gradient,) = torch.autograd.grad(huber_value_loss(100 * values, returns, delta=0.7).sum(), values)
    assert gradient.abs().max() <= 70 + 1e-9


def test_targets_and_old_values_are_constants() -> None:
    values, returns, next_q = (torch.randn(4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ones, probs = torch.ones(4, dtype=torch.float64), torch.full((4, 2), 0.5, dtype=torch.float64)
    for target in (
        td_target(values, values, returns),
        q_learning_target(ones, ones, next_q),
        double_q_learning_target(ones, ones, next_q, next_q),
        sarsa_target(ones, ones, next_q, torch.zeros(4, dtype=torch.long)),
        expected_sarsa_target(ones, ones, next_q, probs),
    ):
        assert not target.requires_grad
    clipped_value_loss(values, returns, returns, clip=0.1).sum().backward()
    (value_loss(values, returns) + huber_value_loss(values, returns)).sum().backward()
    assert returns.grad is None


MDP = random_mdp(7, num_states=4, num_actions=3, gamma=0.9, episodic=False)
EPISODIC = random_mdp(7, num_states=4, num_actions=3, gamma=1.0, episodic=True)
POLICY = np.random.default_rng(1).dirichlet(np.ones(3), size=4)


def mean_over_next_states(mdp: TabularMDP, target) -> np.ndarray:
    """E_s'[target(r, d, s')] for every (s, a): Σ_s' P(s'|s, a) · target, [S, A]."""
    states = mdp.num_states
    shape = (states, mdp.num_actions, states)
    discounts = np.broadcast_to(mdp.gamma * ~mdp.terminal, shape)
    next_states = np.broadcast_to(np.arange(states), shape).copy()
    targets = target(torch.tensor(mdp.reward_array), torch.tensor(discounts), next_states)
    return (mdp.transition_array * targets.numpy()).sum(-1)


@pytest.mark.parametrize("mdp", [MDP, EPISODIC], ids=["endless", "episodic"])
def test_targets_satisfy_bellmans_equations(mdp: TabularMDP) -> None:
    """The mean of each target over what can happen next is the very function that it bootstraps from."""
    values, q = exact.values(mdp, POLICY), exact.action_values(mdp, POLICY)
    best = exact.action_values(mdp, planning.policy_iteration(mdp).policy)
    td = mean_over_next_states(mdp, lambda r, d, s: td_target(r, d, torch.tensor(values[s])))
    np.testing.assert_allclose((POLICY * td).sum(-1)[~mdp.terminal], values[~mdp.terminal], atol=1e-12)
    probs = torch.tensor(POLICY)
    expected = mean_over_next_states(mdp, lambda r, d, s: expected_sarsa_target(r, d, torch.tensor(q[s]), probs[s]))
    np.testing.assert_allclose(expected, q, atol=1e-12)
    sarsa = sum(
        mean_over_next_states(
            mdp,
            lambda r, d, s, a=a: (
                probs[s][..., a] * sarsa_target(r, d, torch.tensor(q[s]), torch.full(s.shape, a, dtype=torch.long))
            ),
        )
        for a in range(3)
    )
    np.testing.assert_allclose(sarsa, q, atol=1e-12)
    for target in (
        lambda r, d, s: q_learning_target(r, d, torch.tensor(best[s])),
        lambda r, d, s: double_q_learning_target(r, d, torch.tensor(best[s]), torch.tensor(best[s])),
    ):
        np.testing.assert_allclose(mean_over_next_states(mdp, target), best, atol=1e-12)
    # and Q* isn't a fixed point of the evaluation of another policy
    off = mean_over_next_states(mdp, lambda r, d, s: expected_sarsa_target(r, d, torch.tensor(best[s]), probs[s]))
    assert np.abs(off - best).max() > 1e-3


def test_the_maximum_of_noisy_estimates_is_biased_upwards_and_double_q_learning_is_not() -> None:
    """Two actions worth 0, estimated ±1 by chance: over all 16 pairs of independent estimates."""
    noise = torch.tensor([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)])
    zeros, ones = torch.zeros(16), torch.ones(16)
    selecting, evaluating = noise.repeat_interleave(4, 0), noise.repeat(4, 1)
    assert q_learning_target(zeros, ones, selecting).mean() == 0.5
    assert double_q_learning_target(zeros, ones, selecting, evaluating).mean() == 0


def test_minimisers() -> None:
    """The squared loss ends at the mean of the returns; Huber's between mean and median, where they are skewed."""
    returns = t(0, 0, 0, 0, 10)

    def slope(value: float, loss) -> float:
        values = torch.full((5,), value, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(loss(values, returns).mean(), values)[0].sum().item()

    assert slope(2.0, value_loss) == pytest.approx(0, abs=1e-12)
    assert slope(0.25, huber_value_loss) == pytest.approx(0, abs=1e-12)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="clip"):
        clipped_value_loss(t(0), t(0), t(0), clip=-1.0)
    with pytest.raises(ValueError, match="delta"):
        huber_value_loss(t(0), t(0), delta=0.0)
    # an estimate with another number of actions would be looked up all the same
    with pytest.raises(ValueError, match="next_q_evaluating has the shape"):
        double_q_learning_target.__wrapped__(t(0), t(1), torch.zeros(1, 2), torch.zeros(1, 3))
