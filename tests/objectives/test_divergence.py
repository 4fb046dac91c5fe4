"""KL: exact per state, and its estimators' values and gradients over all sequences of a model of three tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trueup.mdp import SequenceSpace
from trueup.objectives.divergence import (
    categorical_kl,
    k1,
    k2,
    k3,
    k3_of_old,
    kl_penalized_rewards,
    prefix_ratio,
    prefix_weighted,
    sequence_k2,
    token_weighted,
)
from trueup.objectives.policy_gradient import reinforce
from trueup.objectives.reduce import sequence_mean, sequence_sum
from trueup.objectives.returns import discounted_returns


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def gradient(value: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), parameter, retain_graph=True)[0]


# --- One state ------------------------------------------------------------------------------------------------------


def test_categorical_kl_golden() -> None:
    p, q = t(0.5, 0.25, 0.25).log(), t(0.25, 0.25, 0.5).log()
    # ½·log 2 + 0 − ¼·log 2
    assert categorical_kl(p, q).item() == pytest.approx(0.25 * math.log(2), abs=1e-15)
    assert categorical_kl(p, p) == 0
    torch.testing.assert_close(
        categorical_kl(p, q),
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
        ),
    )


def test_categorical_kl_of_impossible_outcomes() -> None:
    p, q = t(0.5, 0.5, 0.0).log(), t(0.25, 0.25, 0.5).log()
    assert categorical_kl(p, q).item() == pytest.approx(math.log(2))
    assert categorical_kl(q, p).item() == math.inf
    assert categorical_kl(p, p) == 0
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    blocked = torch.tensor([False, False, True])
    kl = categorical_kl(torch.log_softmax(logits.masked_fill(blocked, -math.inf), -1), q)
    assert gradient(kl, logits).isfinite().all()


def test_categorical_kl_names_the_other_one() -> None:
    with pytest.raises(ValueError, match=r"^other_logprobs has the shape"):
        categorical_kl.__wrapped__(t(0.5, 0.5).log(), t(1.0).log())


@pytest.mark.parametrize("apart", [0.0, 1e-4, 1.0, 10.0])
def test_kl_is_never_negative(apart: float) -> None:
    """Jensen: log E[π_ref/π] bounds −KL and is 0; and every k3, whose mean it is, is not negative. 0 only if equal."""
    generator = torch.Generator().manual_seed(5)
    logits, direction = torch.randn((2, 200, 7), generator=generator, dtype=torch.float64)
    logprobs, ref = torch.log_softmax(logits, -1), torch.log_softmax(logits + apart * direction, -1)
    kl = categorical_kl(logprobs, ref)
    torch.testing.assert_close((logprobs.exp() * (ref - logprobs).exp()).sum(-1).log(), torch.zeros_like(kl))
    assert (k3(logprobs, ref) >= 0).all()
    torch.testing.assert_close((logprobs.exp() * k3(logprobs, ref)).sum(-1), kl, rtol=1e-5, atol=1e-15)
    assert (kl > 0).all() if apart else (kl == 0).all()


def test_estimators_golden() -> None:
    logprobs, ref = t(0.5, 0.5).log(), t(0.25, 1.0).log()
    two = math.log(2)
    torch.testing.assert_close(k1(logprobs, ref), t(two, -two))
    torch.testing.assert_close(k2(logprobs, ref), t(two**2 / 2, two**2 / 2))
    torch.testing.assert_close(k3(logprobs, ref), t(0.5 - 1 + two, 2 - 1 - two))
    torch.testing.assert_close(k3_of_old(logprobs, ref), t(2 - 1 - two, 0.5 - 1 + two))
    assert sequence_k2(logprobs, ref) == pytest.approx(0)
    rewards = kl_penalized_rewards(t(0, 1), logprobs, ref, kl_coef=0.5)
    torch.testing.assert_close(rewards, t(-two / 2, 1 + two / 2))
    torch.testing.assert_close(prefix_ratio(logprobs, ref), t(2, 1))


def test_k3_keeps_its_digits_where_policies_are_close() -> None:
    """k3 ≈ ½·x² for a log-ratio x; computed as exp(−x) − 1 + x in float32 it would be noise."""
    ref, x = torch.zeros(1), 1e-3
    assert k3(torch.tensor([x]), ref).item() == pytest.approx(x * x / 2, rel=1e-3)


def test_masks_bridge_gaps() -> None:
    logprobs, ref = t(0.5, math.nan, 0.5).log(), t(0.25, math.nan, 0.125).log()
    mask = torch.tensor([True, False, True])
    two = math.log(2)
    torch.testing.assert_close(prefix_ratio(logprobs, ref, mask), t(2, 1, 8))
    assert sequence_k2(logprobs, ref, mask).item() == pytest.approx((3 * two) ** 2 / 2)
    torch.testing.assert_close(
        kl_penalized_rewards(t(1, 1, 1), logprobs, ref, kl_coef=1, mask=mask), t(1 - two, 0, 1 - 2 * two)
    )
    torch.testing.assert_close(prefix_weighted(t(1, math.nan, 1), logprobs, ref, mask), t(2, 0, 8))
    torch.testing.assert_close(token_weighted(t(1, math.nan, 1), logprobs, ref, mask), t(2, 0, 4))


def test_gradients_match_finite_differences() -> None:
    logprobs, ref, old = torch.randn((3, 2, 4), dtype=torch.float64)
    logprobs.requires_grad_()
    mask = torch.tensor([[True, True, False, True], [True] * 4])
    for estimate in (
        lambda lp: k1(lp, ref),
        lambda lp: k2(lp, ref),
        lambda lp: k3(lp, ref),
        lambda lp: k3_of_old(lp, ref),
        lambda lp: sequence_k2(lp, ref, mask),
        lambda lp: prefix_weighted(k3(lp, ref), lp, old, mask),
        lambda lp: token_weighted(k1(lp, ref), lp, old, mask),
        lambda lp: categorical_kl(torch.log_softmax(lp, -1), torch.log_softmax(ref, -1)),
        lambda lp: categorical_kl(torch.log_softmax(ref, -1), torch.log_softmax(lp, -1)),
    ):
        assert torch.autograd.gradcheck(estimate, logprobs)


def test_reference_is_a_constant_and_the_shaped_reward_too() -> None:
    logprobs, ref = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (k1(logprobs, ref) + k2(logprobs, ref) + k3(logprobs, ref) + k3_of_old(logprobs, ref)).sum().backward()
    sequence_k2(logprobs, ref).backward()
    assert ref.grad is None
    assert not kl_penalized_rewards(ref, logprobs, ref, kl_coef=0.1).requires_grad


# --- Values and gradients over all sequences of three tokens ---------------------------------------------------------


class Case:
    """A table model over three tokens, its reference, and every sequence that it can say."""

    def __init__(self, seed: int, end_token: int | None) -> None:
        self.space = SequenceSpace(vocabulary_size=3, max_length=3, end_token=end_token)
        shape = (self.space.num_contexts, 3)
        generator = torch.Generator().manual_seed(seed)
        self.logits, self.ref_logits, self.old_logits = torch.randn(
            (3, *shape), generator=generator, dtype=torch.float64
        )
        self.logits.requires_grad_()
        self.mask = self.space.mask
        self.logprobs = self.space.token_logprobs(self.logits)
        self.ref = self.space.token_logprobs(self.ref_logits)
        self.old = self.space.token_logprobs(self.old_logits)
        self.truth = self.space.kl(self.logits, self.ref_logits)

    def mean(self, losses: Tensor, sampled_from: Tensor | None = None) -> Tensor:
        """E over sequences, sampled from the policy (its probabilities constant: they were drawn) or another one."""
        sampled = (self.logprobs if sampled_from is None else sampled_from).detach()
        per_sequence = sequence_sum(losses, self.mask) if losses.ndim == 2 else losses
        return (sampled.sum(-1).exp() * per_sequence).sum()

    def gradient(self, losses: Tensor, sampled_from: Tensor | None = None) -> Tensor:
        return gradient(self.mean(losses, sampled_from), self.logits)

    def own_kl_gradient(self, *, reverse: bool = False) -> Tensor:
        """Σ_t of the gradients of the KL in each visited state, the visits held fixed; KL(π_ref‖π) if ``reverse``."""
        policy, ref = torch.log_softmax(self.logits, -1), torch.log_softmax(self.ref_logits, -1)
        per_state = categorical_kl(ref, policy) if reverse else categorical_kl(policy, ref)
        return self.gradient(torch.where(self.mask, per_state[self.space.contexts], 0.0))


CASES = [(seed, end) for seed in range(4) for end in (None, 2)]


@pytest.fixture(params=CASES, ids=lambda case: f"seed{case[0]}-{'fixed' if case[1] is None else 'ends'}")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def test_values(case: Case) -> None:
    """k1 and k3 are unbiased for the sequence KL, k2 is not."""
    torch.testing.assert_close(case.mean(k1(case.logprobs, case.ref)), case.truth)
    torch.testing.assert_close(case.mean(k3(case.logprobs, case.ref)), case.truth)
    assert (case.mean(k2(case.logprobs, case.ref)) - case.truth).abs() > 1e-3
    assert (case.mean(sequence_k2(case.logprobs, case.ref, case.mask)) - case.truth).abs() > 1e-3
    per_state = categorical_kl(torch.log_softmax(case.logits, -1), torch.log_softmax(case.ref_logits, -1))
    torch.testing.assert_close(case.mean(per_state[case.space.contexts]), case.truth)


def test_k1_in_the_reward_is_exact(case: Case) -> None:
    """Undiscounted reward-to-go, or the whole return: ∇(E[r] − β·KL). With a discount it isn't."""
    rewards = torch.linspace(-1, 2, len(case.space), dtype=torch.float64)
    last = case.mask & ~torch.nn.functional.pad(case.mask[:, 1:], (0, 1))
    beta = 0.3
    shaped = kl_penalized_rewards(
        torch.where(last, rewards.unsqueeze(-1), 0.0), case.logprobs, case.ref, kl_coef=beta, mask=case.mask
    )
    objective = (case.logprobs.sum(-1).exp() * rewards).sum() - beta * case.truth
    exact = gradient(objective, case.logits)
    to_go = discounted_returns(shaped, torch.ones_like(shaped), mask=case.mask)
    torch.testing.assert_close(-case.gradient(reinforce(case.logprobs, to_go)), exact, rtol=0, atol=1e-12)
    whole = to_go[:, :1].expand_as(to_go)
    torch.testing.assert_close(-case.gradient(reinforce(case.logprobs, whole)), exact, rtol=0, atol=1e-12)
    discounted = discounted_returns(shaped, torch.full_like(shaped, 0.5), mask=case.mask)
    assert (-case.gradient(reinforce(case.logprobs, discounted)) - exact).norm() > 0.05 * exact.norm()


def test_sequence_k2_as_a_loss_is_exact(case: Case) -> None:
    estimate = case.gradient(sequence_k2(case.logprobs, case.ref, case.mask))
    torch.testing.assert_close(estimate, gradient(case.truth, case.logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_prefix_weighted_is_exact_on_and_off_policy(case: Case, estimator) -> None:
    exact = gradient(case.truth, case.logits)
    for old in (case.logprobs, case.old):
        losses = prefix_weighted(estimator(case.logprobs, case.ref), case.logprobs, old, case.mask)
        torch.testing.assert_close(case.mean(losses, sampled_from=old), case.truth)
        torch.testing.assert_close(case.gradient(losses, sampled_from=old), exact, rtol=0, atol=1e-12)


def test_token_forms_hold_only_the_tokens_own_gradients(case: Case) -> None:
    """Token k2, and k1 or k3 weighted with the token's ratio, are one in the mean: the visits held fixed."""
    own = case.own_kl_gradient()
    forms = {
        "k2": k2(case.logprobs, case.ref),
        "weighted k1": token_weighted(k1(case.logprobs, case.ref), case.logprobs, case.logprobs, case.mask),
        "weighted k3": token_weighted(k3(case.logprobs, case.ref), case.logprobs, case.logprobs, case.mask),
    }
    for losses in forms.values():
        torch.testing.assert_close(case.gradient(losses), own, rtol=0, atol=1e-12)
    # In the last position nothing comes after: there, and only there, that is the whole gradient.
    exact = gradient(case.truth, case.logits)
    final = torch.unique(case.space.contexts[:, -1][case.mask[:, -1]])
    torch.testing.assert_close(own[final], exact[final], rtol=0, atol=1e-12)
    assert (own - exact).abs().max() > 1e-2


def test_token_forms_are_off_by_more_than_half() -> None:
    """On this model of three tokens; relative error of the gradient, in norm."""
    case = Case(0, None)
    exact = gradient(case.truth, case.logits)
    assert (case.own_kl_gradient() - exact).norm() > 0.5 * exact.norm()
    for losses in (k2(case.logprobs, case.ref), k3(case.logprobs, case.ref)):
        assert (case.gradient(losses) - exact).norm() > 0.5 * exact.norm()


def test_token_k3_as_a_loss_is_the_other_direction(case: Case) -> None:
    """GRPO as published: the states' KL(π_ref‖π), so another fixed point."""
    estimate = case.gradient(k3(case.logprobs, case.ref))
    torch.testing.assert_close(estimate, case.own_kl_gradient(reverse=True), rtol=0, atol=1e-12)


def test_token_k1_as_a_loss_has_no_expected_gradient(case: Case) -> None:
    """On-policy and summed. A mean over each sequence's length isn't nothing: the length depends on what is said."""
    assert case.gradient(k1(case.logprobs, case.ref)).abs().max() < 1e-14
    if not case.mask.all():
        probabilities = case.logprobs.detach().sum(-1).exp()
        rows = torch.stack(
            [sequence_mean(row, m) for row, m in zip(k1(case.logprobs, case.ref), case.mask, strict=True)]
        )
        assert gradient(probabilities * rows, case.logits).abs().max() > 1e-3


def test_fixed_points_of_the_regularised_objective() -> None:
    """One choice of three, π* ∝ π_ref·exp(r/β): k1 in the reward and k2 as a loss stay there, k3 as a loss leaves."""
    space, beta, rewards = SequenceSpace(3, 1), 0.5, t(1.0, 0.0, -0.4)
    ref_logits = t(0.2, -0.3, 0.0).unsqueeze(0)
    logits = (ref_logits + rewards / beta).requires_grad_()
    logprobs, ref = space.token_logprobs(logits), space.token_logprobs(ref_logits)
    probabilities = logprobs.detach().exp()
    per_token = rewards.unsqueeze(-1)

    def slope(losses: Tensor) -> float:
        return gradient(probabilities * losses, logits).abs().max().item()

    shaped = kl_penalized_rewards(per_token, logprobs, ref, kl_coef=beta)
    assert slope(reinforce(logprobs, shaped)) < 1e-14
    assert slope(reinforce(logprobs, per_token) + beta * k2(logprobs, ref)) < 1e-14
    assert slope(reinforce(logprobs, per_token) + beta * token_weighted(k3(logprobs, ref), logprobs, logprobs)) < 1e-14
    assert slope(reinforce(logprobs, per_token) + beta * k3(logprobs, ref)) > 1e-2
