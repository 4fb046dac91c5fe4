"""Policy-gradient losses: goldens, gradients, and expectations over all trajectories against the exact gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from trueup.mdp import SequenceSpace, Trajectories, enumerate_trajectories, exact, softmax
from trueup.mdp.generators import random_mdp
from trueup.mdp.tabular import TabularMDP
from trueup.objectives.advantages import gae
from trueup.objectives.divergence import categorical_kl
from trueup.objectives.policy_gradient import (
    adapt_kl_leash,
    adapt_kl_penalty,
    cispo,
    clipped,
    clipped_surrogate,
    dual_clipped_surrogate,
    kl_penalized_surrogate,
    log_ratio,
    masked_weights,
    ratio,
    reinforce,
    reinforce_discounted,
    sequence_ratio,
    sequence_ratio_per_token,
    truncated_weights,
)
from trueup.objectives.reduce import sequence_mean, sequence_sum
from trueup.objectives.returns import discounted_returns, discounts_from, elapsed_discounts


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def gradient(loss: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), parameter, retain_graph=True)[0]


PPO = {"clip_low": 0.2, "clip_high": 0.2}
DAPO = {"clip_low": 0.2, "clip_high": 0.28}

# --- Hand-computed values -------------------------------------------------------------------------------------------


def test_ratios_golden() -> None:
    logprobs, old = t(0.6, 0.5, 0.9).log(), t(0.3, 0.5, math.nan).log()
    mask = torch.tensor([True, True, False])
    torch.testing.assert_close(log_ratio(logprobs, old, mask), t(math.log(2), 0, 0))
    torch.testing.assert_close(ratio(logprobs, old, mask), t(2, 1, 1))
    # the geometric mean of 2 and 1
    torch.testing.assert_close(sequence_ratio(logprobs, old, mask), torch.tensor(math.sqrt(2), dtype=torch.float64))
    torch.testing.assert_close(sequence_ratio_per_token(logprobs, old, mask), t(math.sqrt(2), math.sqrt(2), 1))
    nothing = torch.zeros(3, dtype=torch.bool)
    assert sequence_ratio(logprobs, old, nothing) == 1


def test_reinforce_golden() -> None:
    assert reinforce(t(-1, -2), t(3, -4)).tolist() == [3, -8]
    assert reinforce_discounted(t(-1, -2), t(3, -4), t(1, 0.5)).tolist() == [3, -4]


RATIOS = t(0.5, 0.9, 1.25, 1.5, 5.0)


def test_clipped_surrogate_golden() -> None:
    up, down = torch.ones_like(RATIOS), -torch.ones_like(RATIOS)
    # A > 0: min(ρ, 1.28); A < 0: max(ρ, 0.8)
    torch.testing.assert_close(-clipped_surrogate(RATIOS, up, **DAPO), t(0.5, 0.9, 1.25, 1.28, 1.28))
    torch.testing.assert_close(clipped_surrogate(RATIOS, down, **DAPO), t(0.8, 0.9, 1.25, 1.5, 5.0))
    torch.testing.assert_close(-clipped_surrogate(RATIOS, up, **PPO), t(0.5, 0.9, 1.2, 1.2, 1.2))
    nowhere_to_go = clipped_surrogate(RATIOS, up, clip_low=0.0, clip_high=0.0)
    torch.testing.assert_close(-nowhere_to_go, t(0.5, 0.9, 1, 1, 1))


def test_dual_clip_golden() -> None:
    up, down = torch.ones_like(RATIOS), -torch.ones_like(RATIOS)
    torch.testing.assert_close(dual_clipped_surrogate(RATIOS, down, **PPO, clip_ratio=3.0), t(0.8, 0.9, 1.25, 1.5, 3.0))
    single = clipped_surrogate(RATIOS, up, **PPO)
    torch.testing.assert_close(dual_clipped_surrogate(RATIOS, up, **PPO, clip_ratio=3.0), single)


def test_clipped_marks_exactly_the_steps_without_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = (torch.randn(200, generator=generator, dtype=torch.float64) * 0.5).exp().requires_grad_()
    advantages = torch.randn(200, generator=generator, dtype=torch.float64)
    marked = clipped(ratios, advantages, **DAPO)
    assert torch.equal(gradient(clipped_surrogate(ratios, advantages, **DAPO), ratios) == 0, marked)
    assert 0 < marked.sum() < 200
    # at the edge there is a gradient, and an advantage of 0 has none to lose
    assert not clipped(t(1.25, 0.75, 2.0, 0.5), t(1, -1, 0, 0), clip_low=0.25, clip_high=0.25).any()
    assert clipped(t(1.26, 0.74), t(1, -1), clip_low=0.25, clip_high=0.25).all()


def test_kl_penalised_golden() -> None:
    assert kl_penalized_surrogate(t(1.5, 0.5), t(2, -2), t(0.1, 0.2), kl_coef=10).tolist() == [-2, 3]


def test_cispo_golden() -> None:
    logprobs = t(-1, -1, -1)
    high_only = cispo(logprobs, t(0.1, 1.1, 9.0), t(1, 1, -2), clip_high=0.5)
    torch.testing.assert_close(high_only, t(0.1, 1.1, -3.0))
    both = cispo(logprobs, t(0.1, 1.1, 9.0), t(1, 1, -2), clip_high=0.5, clip_low=0.2)
    torch.testing.assert_close(both, t(0.8, 1.1, -3.0))


def test_weights_for_samples_of_another_policy_golden() -> None:
    ratios = t(0.25, 0.5, 0.7, 1, 1.9, 2, 3)
    assert truncated_weights(ratios, cap=2).tolist() == [0.25, 0.5, 0.7, 1, 1.9, 2, 2]
    assert masked_weights(ratios, cap=2).tolist() == [0, 0.5, 0.7, 1, 1.9, 2, 0]
    # With a cap of 1 the first can only take away, and the second leaves what both policies agree on.
    assert truncated_weights(ratios, cap=1).tolist() == [0.25, 0.5, 0.7, 1, 1, 1, 1]
    assert masked_weights(ratios, cap=1).tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert not truncated_weights(ratios.requires_grad_(), cap=2).requires_grad
    assert not masked_weights(ratios, cap=2).requires_grad


def test_adapt_kl_penalty_golden() -> None:
    assert [adapt_kl_penalty(1.0, kl, 0.3) for kl in (0.19, 0.21, 0.3, 0.44, 0.46)] == [0.5, 1, 1, 1, 2]
    assert [adapt_kl_penalty(1.0, kl, 1.5) for kl in (1.0, 2.25)] == [1, 1]


def test_adapt_kl_leash_golden() -> None:
    # errors −0.9 → −0.2, −0.1, 0, 0.1, 2 → 0.2
    updated = [adapt_kl_leash(0.2, kl, 6.0) for kl in (0.6, 5.4, 6.0, 6.6, 18.0)]
    assert updated == pytest.approx([0.196, 0.198, 0.2, 0.202, 0.204])
    assert adapt_kl_leash(0.2, 18.0, 6.0, gain=0.5) == pytest.approx(0.22)


# --- Gradients ------------------------------------------------------------------------------------------------------


def test_gradients_match_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    logprobs, old, advantages = torch.randn((3, 2, 4), generator=generator, dtype=torch.float64)
    logprobs.requires_grad_()
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    losses = [
        lambda lp: reinforce(lp, advantages),
        lambda lp: reinforce_discounted(lp, advantages, old.exp()),
        lambda lp: clipped_surrogate(ratio(lp, old, mask), advantages, **DAPO),
        lambda lp: dual_clipped_surrogate(ratio(lp, old, mask), advantages, **DAPO, clip_ratio=3.0),
        lambda lp: clipped_surrogate(sequence_ratio(lp, old, mask), advantages[:, 0], clip_low=3e-4, clip_high=4e-4),
        lambda lp: kl_penalized_surrogate(ratio(lp, old), advantages, lp.square(), kl_coef=0.3),
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, logprobs)


def test_constants_get_no_gradient() -> None:
    logprobs, old, advantages = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weights = ratio(logprobs, old)
    loss = (
        clipped_surrogate(weights, advantages, **PPO)
        + dual_clipped_surrogate(weights, advantages, **PPO, clip_ratio=1.5)
        + reinforce(logprobs, advantages)
        + cispo(logprobs, weights, advantages, clip_high=0.2)
        + reinforce_discounted(logprobs, advantages, old)
        + kl_penalized_surrogate(weights, advantages, weights, kl_coef=1)
        + sequence_ratio_per_token(logprobs, old)
    )
    loss.sum().backward()
    assert old.grad is None
    assert advantages.grad is None
    assert logprobs.grad is not None


def test_cispo_gradient_is_the_weighted_score() -> None:
    """However far a ratio went: clip(ρ)·A times the score, where the clipped surrogate has given up."""
    logprobs = t(0.0, 0.0).requires_grad_()
    old, advantages = t(-3.0, 0.1), t(1.0, 1.0)
    weights = ratio(logprobs, old)
    torch.testing.assert_close(
        gradient(cispo(logprobs, weights, advantages, clip_high=1.0), logprobs), t(-2.0, -math.exp(-0.1))
    )
    assert gradient(clipped_surrogate(ratio(logprobs, old), advantages, **PPO), logprobs)[0] == 0


def test_gspo_token_has_the_gradient_of_gspo() -> None:
    """With one advantage per sequence and the mean over its tokens."""
    generator = torch.Generator().manual_seed(2)
    logprobs, old = torch.randn((2, 3, 5), generator=generator, dtype=torch.float64) * 0.1
    logprobs.requires_grad_()
    mask = torch.tensor([[True] * 5, [True, True, False, True, False], [True] + [False] * 4])
    advantages = t(1.0, -2.0, 0.5)
    ranges = {"clip_low": 0.02, "clip_high": 0.03}
    by_sequence = clipped_surrogate(sequence_ratio(logprobs, old, mask), advantages, **ranges).mean()
    per_token = clipped_surrogate(
        sequence_ratio_per_token(logprobs, old, mask), advantages.unsqueeze(-1).expand(3, 5), **ranges
    )
    torch.testing.assert_close(sequence_mean(per_token, mask), by_sequence)
    torch.testing.assert_close(gradient(sequence_mean(per_token, mask), logprobs), gradient(by_sequence, logprobs))


# --- On-policy: every surrogate is REINFORCE ------------------------------------------------------------------------


def surrogates_of(logits: Tensor, old_logits: Tensor, actions: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    table, old_table = torch.log_softmax(logits, -1), torch.log_softmax(old_logits, -1)
    logprobs = table.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    weights = ratio(logprobs, old_table.gather(-1, actions.unsqueeze(-1)).squeeze(-1))
    kl = categorical_kl(old_table.detach(), table)
    return {
        "reinforce": reinforce(logprobs, advantages),
        "clipped": clipped_surrogate(weights, advantages, **DAPO),
        "dual": dual_clipped_surrogate(weights, advantages, **DAPO, clip_ratio=3.0),
        "penalised": kl_penalized_surrogate(weights, advantages, kl, kl_coef=2.0),
        "cispo": cispo(logprobs, weights, advantages, clip_high=0.2),
    }


def test_on_policy_all_surrogates_are_reinforce_until_the_first_step() -> None:
    """Old log-probs are the current ones only until the first optimiser step; after it they are a snapshot."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    actions = torch.randint(4, (6,), generator=generator)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    snapshot = logits.detach().clone()
    losses = surrogates_of(logits, snapshot, actions, advantages)
    expected = gradient(losses["reinforce"], logits)
    for loss in losses.values():
        torch.testing.assert_close(gradient(loss, logits), expected, rtol=0, atol=1e-15)
    # Whether old log-probs are a copy, or the current ones without their gradient, is the same thing here …
    same = surrogates_of(logits, logits, actions, advantages)
    torch.testing.assert_close(gradient(same["clipped"], logits), expected, rtol=0, atol=1e-15)
    # … and no more after a step.
    with torch.no_grad():
        logits -= 2.0 * expected
    losses = surrogates_of(logits, snapshot, actions, advantages)
    expected = gradient(losses["reinforce"], logits)
    for name in ("clipped", "dual", "penalised", "cispo"):
        assert (gradient(losses[name], logits) - expected).abs().max() > 1e-3, name


def test_gspo_on_policy_is_reinforce_over_lengths() -> None:
    logprobs = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [True] + [False] * 4])
    advantages = t(1.0, -2.0, 0.5)
    gspo = clipped_surrogate(sequence_ratio(logprobs, logprobs, mask), advantages, clip_low=3e-4, clip_high=4e-4)
    tokens = sequence_mean(reinforce(logprobs, advantages.unsqueeze(-1).expand(3, 5)), mask, 1)
    torch.testing.assert_close(gradient(gspo, logprobs), gradient(tokens, logprobs))


# --- Expectation over all trajectories ------------------------------------------------------------------------------


@dataclass
class Enumerated:
    """A small episodic process, a softmax policy on it, and every trajectory with its probability."""

    mdp: TabularMDP
    logits: Tensor
    paths: Trajectories

    @property
    def mask(self) -> Tensor:
        return torch.tensor(self.paths.mask)

    @property
    def returns(self) -> Tensor:
        return discounted_returns(torch.tensor(self.paths.rewards), self.discounts, mask=self.mask)

    @property
    def discounts(self) -> Tensor:
        return discounts_from(torch.tensor(self.paths.terminated), self.mdp.gamma, dtype=torch.float64)

    @property
    def elapsed(self) -> Tensor:
        return elapsed_discounts(torch.tensor(self.paths.terminated), self.mdp.gamma, self.mask, dtype=torch.float64)

    def at_states(self, table: np.ndarray) -> Tensor:
        return torch.tensor(table[self.paths.states])

    def logprobs(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits, -1)[self.paths.states, self.paths.actions]

    def mean_gradient(self, losses: Tensor) -> Tensor:
        """−E[∇ Σ_t L_t]: the ascent direction that the estimator has in the mean."""
        probabilities = torch.tensor(self.paths.probabilities)
        return -gradient(probabilities * sequence_sum(losses, self.mask), self.logits)


def enumerated(seed: int, gamma: float = 0.7) -> Enumerated:
    mdp = random_mdp(seed, num_states=5, num_actions=2, gamma=gamma, episodic=True)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 2, generator=generator, dtype=torch.float64).requires_grad_()
    paths = enumerate_trajectories(mdp, softmax.softmax_policy(logits), horizon=4)
    assert not paths.truncated.any()
    return Enumerated(mdp, logits, paths)


BASELINES = {
    "none": lambda case: np.zeros(5),
    "constant": lambda case: np.full(5, 1.7),
    "any function of the state": lambda case: np.array([3.0, -1.0, 0.5, 2.0, 0.0]),
    "true values": lambda case: exact.values(case.mdp, softmax.softmax_policy(case.logits)),
}


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("seed", range(3))
def test_reinforce_with_and_without_gamma_to_the_t(seed: int, baseline: str) -> None:
    """With γ^t the mean is ∇J_γ; without, the dropped-discount direction; no baseline of the state changes either."""
    case = enumerated(seed)
    advantages = case.returns - case.at_states(BASELINES[baseline](case))
    true_gradient = softmax.policy_gradient(case.mdp, case.logits)
    dropped = softmax.dropped_discount_gradient(case.mdp, case.logits)
    with_weights = case.mean_gradient(reinforce_discounted(case.logprobs(case.logits), advantages, case.elapsed))
    without = case.mean_gradient(reinforce(case.logprobs(case.logits), advantages))
    torch.testing.assert_close(with_weights, true_gradient, rtol=0, atol=1e-10)
    torch.testing.assert_close(without, dropped, rtol=0, atol=1e-10)
    # They are different things:
    assert (true_gradient - dropped).norm() > 0.1 * true_gradient.norm()


def test_without_discount_both_are_the_gradient() -> None:
    case = enumerated(0, gamma=1.0)
    true_gradient = softmax.policy_gradient(case.mdp, case.logits)
    torch.testing.assert_close(
        softmax.dropped_discount_gradient(case.mdp, case.logits), true_gradient, rtol=0, atol=1e-14
    )
    without = case.mean_gradient(reinforce(case.logprobs(case.logits), case.returns))
    torch.testing.assert_close(without, true_gradient, rtol=0, atol=1e-10)


def test_a_baseline_that_depends_on_the_action_is_biased() -> None:
    """The control: the expectation test does notice a wrong baseline."""
    case = enumerated(0)
    q = exact.action_values(case.mdp, softmax.softmax_policy(case.logits))
    advantages = case.returns - torch.tensor(q[case.paths.states, case.paths.actions])
    estimate = case.mean_gradient(reinforce_discounted(case.logprobs(case.logits), advantages, case.elapsed))
    assert (estimate - softmax.policy_gradient(case.mdp, case.logits)).abs().max() > 1e-2


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_actor_critic_with_true_values_is_exact(gae_lambda: float) -> None:
    case = enumerated(1)
    values = exact.values(case.mdp, softmax.softmax_policy(case.logits))
    advantages = gae(
        torch.tensor(case.paths.rewards),
        case.discounts,
        case.at_states(values),
        torch.tensor(values[case.paths.next_states]),
        gae_lambda=gae_lambda,
        mask=case.mask,
    )
    estimate = case.mean_gradient(reinforce_discounted(case.logprobs(case.logits), advantages, case.elapsed))
    torch.testing.assert_close(estimate, softmax.policy_gradient(case.mdp, case.logits), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["clipped", "dual", "penalised", "cispo"])
def test_surrogates_on_policy_have_the_exact_gradient_in_the_mean(name: str) -> None:
    """The whole chain: enumerate, discount, weigh with γ^t, surrogate at ratio 1, sum over steps: ∇J_γ."""
    case = enumerated(2)
    logprobs = case.logprobs(case.logits)
    weights, gains = ratio(logprobs, logprobs, case.mask), case.elapsed * case.returns
    table = torch.log_softmax(case.logits, -1)
    loss = {
        "clipped": lambda: clipped_surrogate(weights, gains, **PPO),
        "dual": lambda: dual_clipped_surrogate(weights, gains, **PPO, clip_ratio=3.0),
        "penalised": lambda: kl_penalized_surrogate(
            weights, gains, categorical_kl(table.detach(), table)[case.paths.states], kl_coef=3.0
        ),
        "cispo": lambda: cispo(logprobs, weights, gains, clip_high=0.2),
    }[name]()
    torch.testing.assert_close(
        case.mean_gradient(loss), softmax.policy_gradient(case.mdp, case.logits), rtol=0, atol=1e-10
    )


def test_importance_weights_carry_trajectories_of_one_policy_to_another() -> None:
    """E_old[Π ρ_t · R] = J(π) for the sampled policy's trajectories, value and gradient; a step's isn't enough."""
    case = enumerated(0)
    other = case.logits.detach().flip(-1).requires_grad_()
    log_ratios = log_ratio(case.logprobs(other), case.logprobs(case.logits), case.mask)
    probabilities = torch.tensor(case.paths.probabilities)
    objective = (probabilities * log_ratios.sum(-1).exp() * case.returns[:, 0]).sum()
    truth = softmax.expected_return(case.mdp, other)
    torch.testing.assert_close(objective, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(objective, other), gradient(truth, other), rtol=0, atol=1e-10)
    per_step = probabilities * sequence_sum(log_ratios.exp() * case.elapsed * case.returns, case.mask)
    assert (gradient(per_step, other) - gradient(softmax.expected_return(case.mdp, other), other)).abs().max() > 1e-2


def test_variance_of_importance_weights_grows_as_policies_part() -> None:
    """Over all trajectories: Var_old[ρ] = E_π[ρ] − 1 ≥ e^KL − 1, and the mean of what is weighed stays right."""
    case = enumerated(0)
    old = torch.tensor(case.paths.probabilities)
    direction = torch.randn(5, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sampled, variances = case.logprobs(case.logits).detach(), []
    for distance in (0.0, 0.3, 1.0, 2.0, 4.0):
        moved = case.logits.detach() + distance * direction
        log_ratios = log_ratio(case.logprobs(moved), sampled, case.mask).sum(-1)
        weights = log_ratios.exp()
        variance = (old * (weights - 1).square()).sum()
        torch.testing.assert_close((old * weights * case.returns[:, 0]).sum(), softmax.expected_return(case.mdp, moved))
        torch.testing.assert_close(variance, (old * weights * weights).sum() - 1)
        assert variance >= (old * weights * log_ratios).sum().exp() - 1
        variances.append(variance.item())
    assert variances[0] == 0
    assert all(later > 1.5 * earlier for earlier, later in pairwise(variances))


def test_importance_weights_of_independent_tokens_multiply_their_second_moments() -> None:
    """E_π[ρ] of T tokens that are drawn alike is that of one to the power of T: exponential in the length."""
    new, old = torch.log_softmax(torch.tensor([[0.5, 0.0, -1.0], [0.0, 0.2, 0.4]], dtype=torch.float64), -1)
    one = (new.exp() * (new - old).exp()).sum()
    for length in (1, 2, 5):
        space = SequenceSpace(vocabulary_size=3, max_length=length)
        logprobs, old_logprobs = (space.token_logprobs(each.expand(space.num_contexts, 3)) for each in (new, old))
        whole = ratio(logprobs, old_logprobs).prod(-1)
        torch.testing.assert_close((old_logprobs.sum(-1).exp() * whole.square()).sum(), one**length)
    assert one > 1.1


def test_refusals() -> None:
    for low, high in ((-0.1, 0.2), (1.1, 0.2), (0.2, -0.2)):
        with pytest.raises(ValueError, match="clip_low"):
            clipped_surrogate(t(1), t(1), clip_low=low, clip_high=high)
        with pytest.raises(ValueError, match="clip_low"):
            clipped(t(1), t(1), clip_low=low, clip_high=high)
    for too_low in (1.1, 1.2):
        with pytest.raises(ValueError, match="clip_ratio"):
            dual_clipped_surrogate(t(1), t(1), **PPO, clip_ratio=too_low)
    with pytest.raises(ValueError, match="clip_low"):
        cispo(t(0), t(1), t(1), clip_high=-0.5)
    with pytest.raises(ValueError, match="clip_low"):
        cispo(t(0), t(1), t(1), clip_high=0.5, clip_low=1.5)
    for weights in (truncated_weights, masked_weights):
        with pytest.raises(ValueError, match=r"at least 1, not 0\.9"):
            weights(t(1), cap=0.9)
    for adapt in (adapt_kl_penalty, adapt_kl_leash):
        with pytest.raises(ValueError, match="target"):
            adapt(0.1, 0.5, 0.0)
