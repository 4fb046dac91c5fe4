"""Preference losses: goldens, gradients, identities, and the exact minimisers of their population losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trueup.objectives.optimum import kl_regularized_optimum
from trueup.objectives.preference import (
    bradley_terry_logprob,
    conservative_dpo,
    dpo,
    dpo_by_index,
    hinge,
    implicit_rewards,
    ipo,
    odds_ratio_loss,
    orpo,
    plackett_luce_dpo,
    plackett_luce_logprob,
    reward_model_loss,
    robust_dpo,
    rpo,
    simpo,
)

PairLoss = Callable[..., Tensor]

LENGTHS = {"chosen_lengths": torch.tensor([3, 7, 2, 9]), "rejected_lengths": torch.tensor([4, 4, 11, 1])}

WITH_REFERENCE: dict[str, PairLoss] = {
    "dpo": partial(dpo, beta=0.7),
    "conservative": partial(conservative_dpo, beta=0.7, label_smoothing=0.2),
    "robust": partial(robust_dpo, beta=0.7, label_smoothing=0.2),
    "ipo": partial(ipo, beta=0.7),
    "ipo by length": partial(ipo, beta=0.7, **LENGTHS),
    "hinge": partial(hinge, beta=0.7),
    "rpo": partial(rpo, beta=0.7, alpha=1.3, chosen_lengths=LENGTHS["chosen_lengths"]),
}
WITHOUT_REFERENCE: dict[str, PairLoss] = {
    "simpo": partial(simpo, beta=2.0, margin=0.5, **LENGTHS),
    "odds ratio": partial(odds_ratio_loss, **LENGTHS),
    "orpo": partial(orpo, coef=0.4, **LENGTHS),
}


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random_logprobs(*shape: int, seed: int = 0) -> Tensor:
    return -10 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 0.5


def random_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def newton(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The minimiser of a smooth convex loss that is flat along a constant shift, to the last digits of float64."""
    x = start.clone()
    for _ in range(60):
        gradient = torch.autograd.functional.jacobian(loss, x)
        if gradient.abs().max() < 1e-13:
            return x
        step = torch.linalg.pinv(torch.autograd.functional.hessian(loss, x), hermitian=True) @ gradient
        size = 1.0
        while size > 1e-6 and loss(x - size * step) > loss(x):
            size /= 2
        x = x - size * step
    assert gradient.abs().max() < 1e-10, "Newton's method has not converged"
    return x


# --- goldens -----------------------------------------------------------------------------------------------------


def test_bradley_terry_golden() -> None:
    # a lead of log 3 is odds of 3 : 1
    assert bradley_terry_logprob(t(math.log(3), 0), t(0, math.log(3))).exp().tolist() == pytest.approx([0.75, 0.25])


def test_plackett_luce_golden() -> None:
    # weights 1, 2, 3, 4 drawn without replacement in this order: 1/10 · 2/9 · 3/7
    assert plackett_luce_logprob(t(1, 2, 3, 4).log()).exp().item() == pytest.approx(1 / 105, rel=1e-14)
    assert plackett_luce_logprob(t(5)).item() == 0


def test_reward_model_golden() -> None:
    scores = t(math.log(3), 0).unsqueeze(0)
    assert reward_model_loss(scores).item() == pytest.approx(-math.log(3 / 4))
    # a margin of log 3 eats up the lead: even odds
    assert reward_model_loss(scores, margin=t(math.log(3))).item() == pytest.approx(math.log(2))
    # the sum of a pair, squared
    assert (reward_model_loss(t(3, 2), centering_coef=0.1) - reward_model_loss(t(3, 2))).item() == pytest.approx(2.5)
    # any K: twice the mean, squared; masked entries don't count
    mask = torch.tensor([True, True, False])
    centred = reward_model_loss(t(3, 2, 99), centering_coef=0.1, mask=mask)
    assert centred.item() == pytest.approx(reward_model_loss(t(3, 2), centering_coef=0.1).item(), rel=1e-15)
    assert (reward_model_loss(t(1, 2, 3), centering_coef=1.0) - reward_model_loss(t(1, 2, 3))).item() == pytest.approx(
        16
    )


def test_margin_of_a_list_is_the_lead_of_its_first() -> None:
    # log-weights 1, 2, 3 with the first divided by e^m: stage one is 1/(1 + 5e^m), stage two is unchanged, 2/5
    expected = -math.log(1 / (1 + 5 * math.e) * 2 / 5)
    assert reward_model_loss(t(1, 2, 3).log(), margin=t(1).squeeze()).item() == pytest.approx(expected)


def test_pair_loss_goldens() -> None:
    # log-ratios: chosen −5 − (−6) = 1, rejected −7 − (−5) = −2, so h = 3
    four = t(-5), t(-7), t(-6), t(-5)
    three_to_one = math.log(3) / 3  # with this β, β·h = log 3 and σ(β·h) = 3/4
    assert dpo(*four, beta=three_to_one).item() == pytest.approx(-math.log(3 / 4))
    smoothed = conservative_dpo(*four, beta=three_to_one, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(-0.75 * math.log(3 / 4) - 0.25 * math.log(1 / 4))
    robust = robust_dpo(*four, beta=three_to_one, label_smoothing=0.25)
    assert robust.item() == pytest.approx((-0.75 * math.log(3 / 4) + 0.25 * math.log(1 / 4)) / 0.5)
    assert ipo(*four, beta=0.25).item() == pytest.approx((3 - 2) ** 2)
    two, four_tokens = torch.tensor([2]), torch.tensor([4])
    # per token: 1/2 − (−2/4) = 1
    assert ipo(*four, beta=0.25, chosen_lengths=two, rejected_lengths=four_tokens).item() == pytest.approx((1 - 2) ** 2)
    assert hinge(*four, beta=0.1).item() == pytest.approx(0.7)
    assert hinge(*four, beta=0.5).item() == 0
    assert rpo(*four, beta=three_to_one, alpha=2.0, chosen_lengths=two).item() == pytest.approx(-math.log(3 / 4) + 5)
    assert implicit_rewards(t(-5, -7), t(-6, -5), 0.1).tolist() == pytest.approx([0.1, -0.2])


def test_reference_free_goldens() -> None:
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
    # mean log-probs −1 and −2; β·1 − γ = log 3
    lead = simpo(t(-2), t(-8), beta=2 * math.log(3), margin=math.log(3), **lengths)
    assert lead.item() == pytest.approx(-math.log(3 / 4))
    # geometric means 3/4 and 1/2: odds 3 and 1
    pair = t(2 * math.log(3 / 4)), t(4 * math.log(1 / 2))
    assert odds_ratio_loss(*pair, **lengths).item() == pytest.approx(-math.log(3 / 4))
    assert orpo(*pair, coef=0.5, **lengths).item() == pytest.approx(-1.5 * math.log(3 / 4))


def test_start_of_training_is_log_two() -> None:
    chosen, rejected = random_logprobs(4), random_logprobs(4, seed=1)
    assert dpo(chosen, rejected, chosen, rejected, beta=0.1).tolist() == pytest.approx([math.log(2)] * 4)


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WITH_REFERENCE, *WITHOUT_REFERENCE])
def test_gradients_of_pair_losses(name: str) -> None:
    loss = (WITH_REFERENCE | WITHOUT_REFERENCE)[name]
    num_arguments = 4 if name in WITH_REFERENCE else 2
    arguments = [random_logprobs(4, seed=i).requires_grad_() for i in range(num_arguments)]
    assert torch.autograd.gradcheck(loss, arguments)


def test_gradients_of_ranked_losses() -> None:
    scores, margin = random_normal(3, 4).requires_grad_(), random_normal(3, seed=1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(plackett_luce_logprob, (scores,))
    assert torch.autograd.gradcheck(lambda s: plackett_luce_logprob(s, mask), (scores,))
    assert torch.autograd.gradcheck(
        lambda s, m: reward_model_loss(s, margin=m, centering_coef=0.3, mask=mask), (scores, margin)
    )
    assert torch.autograd.gradcheck(
        lambda p, r: plackett_luce_dpo(p, r, beta=0.3, mask=mask),
        (scores, random_normal(3, 4, seed=2).requires_grad_()),
    )


def test_gradient_of_dpo_is_that_of_the_paper() -> None:
    """−β·σ(r̂_l − r̂_w)·(∇log π(y_w) − ∇log π(y_l)), through a softmax policy over five responses."""
    beta, chosen, rejected = 0.4, torch.tensor([0, 3, 1]), torch.tensor([2, 1, 4])
    ref = random_normal(5, seed=1).log_softmax(-1)
    logits = random_normal(5).requires_grad_()
    logprobs = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad(
        dpo(logprobs[chosen], logprobs[rejected], ref[chosen], ref[rejected], beta=beta).sum(), logits
    )
    rewards = beta * (logits.log_softmax(-1) - ref).detach()
    score_function = torch.eye(5, dtype=torch.float64) - logprobs.detach().exp()  # row y: ∇_logits log π(y)
    weights = -beta * torch.sigmoid(rewards[rejected] - rewards[chosen])
    expected = (weights[:, None] * (score_function[chosen] - score_function[rejected])).sum(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)


def test_hinge_has_no_gradient_beyond_its_margin() -> None:
    chosen = t(-5, -9.9).requires_grad_()
    (gradient,) = torch.autograd.grad(hinge(chosen, t(-9, -9), t(-10, -10), t(-9, -9), beta=1.0).sum(), chosen)
    assert gradient.tolist() == [0, -1]


# --- identities --------------------------------------------------------------------------------------------------


def test_two_ranked_are_bradley_terry_to_the_bit() -> None:
    scores, ref = random_normal(50, 2), random_normal(50, 2, seed=1)
    assert torch.equal(plackett_luce_logprob(scores), bradley_terry_logprob(scores[:, 0], scores[:, 1]))
    assert torch.equal(reward_model_loss(scores), -bradley_terry_logprob(scores[:, 0], scores[:, 1]))
    ours = plackett_luce_dpo(scores, ref, beta=0.3)
    torch.testing.assert_close(
        ours, dpo(scores[:, 0], scores[:, 1], ref[:, 0], ref[:, 1], beta=0.3), rtol=1e-14, atol=0
    )


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=5), st.floats(-100, 100))
@settings(max_examples=40, deadline=None)
def test_rankings_are_a_distribution_and_only_differences_count(scores: list[float], shift: float) -> None:
    orders = torch.tensor(list(itertools.permutations(scores)), dtype=torch.float64)
    logprobs = plackett_luce_logprob(orders)
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(plackett_luce_logprob(orders + shift), logprobs, rtol=1e-10, atol=1e-10)


def test_first_place_of_a_ranking_is_a_softmax() -> None:
    scores = random_normal(4)
    first = torch.zeros(4, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        first[order[0]] += plackett_luce_logprob(scores[list(order)]).exp()
    torch.testing.assert_close(first, scores.softmax(-1))


def test_no_noise_is_dpo() -> None:
    four = [random_logprobs(6, seed=i) for i in range(4)]
    plain = dpo(*four, beta=0.2)
    assert torch.equal(conservative_dpo(*four, beta=0.2, label_smoothing=0.0), plain)
    assert torch.equal(robust_dpo(*four, beta=0.2, label_smoothing=0.0), plain)
    assert torch.equal(rpo(*four, beta=0.2, alpha=0.0, chosen_lengths=torch.full((6,), 5)), plain)


def test_dpo_is_the_reward_model_loss_of_implicit_rewards() -> None:
    chosen, rejected, ref_chosen, ref_rejected = (random_logprobs(6, seed=i) for i in range(4))
    rewards = implicit_rewards(torch.stack([chosen, rejected], -1), torch.stack([ref_chosen, ref_rejected], -1), 0.3)
    torch.testing.assert_close(
        reward_model_loss(rewards), dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.3), rtol=1e-13, atol=0
    )


def test_what_every_prompt_adds_cancels() -> None:
    """A constant on both completions of a pair, under policy or reference, changes no loss of the log-ratios."""
    four = [random_logprobs(4, seed=i) for i in range(4)]
    shifted = four[0] - 3, four[1] - 3, four[2] + 5, four[3] + 5
    for name in ("dpo", "conservative", "robust", "ipo", "hinge"):
        torch.testing.assert_close(WITH_REFERENCE[name](*shifted), WITH_REFERENCE[name](*four))


def test_by_index_is_the_function_of_the_paper() -> None:
    def as_published(pi: Tensor, ref: Tensor, winners: Tensor, losers: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        policy_ratio, ref_ratio = pi[winners] - pi[losers], ref[winners] - ref[losers]
        return -torch.nn.functional.logsigmoid(beta * (policy_ratio - ref_ratio)), (beta * (pi - ref)).detach()

    pi, ref = random_logprobs(6).requires_grad_(), random_logprobs(6, seed=1)
    winners, losers = torch.tensor([0, 3, 0, 5]), torch.tensor([1, 2, 5, 4])  # completion 0 wins twice, 5 once
    losses, rewards = dpo_by_index(pi, ref, winners, losers, 0.1)
    expected_losses, expected_rewards = as_published(pi, ref, winners, losers, 0.1)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-13, atol=0)
    assert torch.equal(rewards, expected_rewards)
    assert not rewards.requires_grad
    (gradient,) = torch.autograd.grad(losses.sum(), pi)
    (expected,) = torch.autograd.grad(expected_losses.sum(), pi)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


# --- expectations: exact population losses on enumerable response spaces --------------------------------------------


NUM_RESPONSES = 5
PAIRS = torch.combinations(torch.arange(NUM_RESPONSES))
"""Every pair of different responses, once."""


def both_labels(loss: Callable[[Tensor, Tensor], Tensor], first_wins: Tensor, weights: Tensor) -> Tensor:
    """The population loss: each pair with its weight, labelled either way with the probability of that label."""
    first, second = PAIRS.unbind(-1)
    return (weights * (first_wins * loss(first, second) + (1 - first_wins) * loss(second, first))).sum()


def preference_problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, log π_ref, the Bradley–Terry label probabilities of all pairs, and how often each pair occurs."""
    rewards = random_normal(NUM_RESPONSES, seed=seed)
    ref = random_normal(NUM_RESPONSES, seed=seed + 1).log_softmax(-1)
    weights = random_normal(len(PAIRS), seed=seed + 2).exp()
    return rewards, ref, torch.sigmoid(rewards[PAIRS[:, 0]] - rewards[PAIRS[:, 1]]), weights


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_dpo_ends_at_the_kl_regularised_optimum(beta: float) -> None:
    rewards, ref, first_wins, weights = preference_problem(seed=3)

    def population(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        return both_labels(lambda w, r: dpo(logprobs[w], logprobs[r], ref[w], ref[r], beta=beta), first_wins, weights)

    minimiser = newton(population, ref).log_softmax(-1)
    optimum, _ = kl_regularized_optimum(ref, rewards, beta)
    torch.testing.assert_close(minimiser, optimum, rtol=0, atol=1e-9)
    # and its implicit rewards are the true ones, up to a constant
    recovered = implicit_rewards(minimiser, ref, beta)
    torch.testing.assert_close(recovered - recovered.mean(), rewards - rewards.mean(), rtol=0, atol=1e-9)


def test_plackett_luce_dpo_ends_at_the_kl_regularised_optimum() -> None:
    beta, rewards, ref = 0.5, random_normal(4, seed=5), random_normal(4, seed=6).log_softmax(-1)
    rankings = torch.tensor(list(itertools.permutations(range(4), 3)))  # all ranked triples of four responses
    frequency = plackett_luce_logprob(rewards[rankings]).exp()

    def population(logits: Tensor) -> Tensor:
        losses = plackett_luce_dpo(logits.log_softmax(-1)[rankings], ref[rankings], beta=beta)
        return (frequency * losses).sum()

    optimum, _ = kl_regularized_optimum(ref, rewards, beta)
    torch.testing.assert_close(newton(population, ref).log_softmax(-1), optimum, rtol=0, atol=1e-9)


def score_differences(**options: float) -> tuple[Tensor, Tensor]:
    """What a reward model with one free score per response recovers from all pairs, and the truth."""
    rewards, _, first_wins, weights = preference_problem(seed=8)
    margin = torch.full((len(PAIRS),), options.pop("margin", 0.0), dtype=torch.float64)

    def population(scores: Tensor) -> Tensor:
        return both_labels(
            lambda w, r: reward_model_loss(torch.stack([scores[w], scores[r]], -1), margin=margin, **options),
            first_wins,
            weights,
        )

    scores = newton(population, torch.zeros(NUM_RESPONSES, dtype=torch.float64))
    return scores - scores.mean(), rewards - rewards.mean()


def test_reward_model_recovers_score_differences() -> None:
    recovered, truth = score_differences()
    torch.testing.assert_close(recovered, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"centering_coef": 0.05}, {"margin": 0.5}])
def test_centring_and_margin_bias_score_differences(options: dict[str, float]) -> None:
    recovered, truth = score_differences(**options)
    assert (recovered - truth).abs().max() > 0.05


def test_ranked_reward_model_recovers_score_differences() -> None:
    rewards = random_normal(4, seed=11)
    rankings = torch.tensor(list(itertools.permutations(range(4))))
    frequency = plackett_luce_logprob(rewards[rankings]).exp()
    scores = newton(lambda s: (frequency * reward_model_loss(s[rankings])).sum(), torch.zeros_like(rewards))
    torch.testing.assert_close(scores - scores.mean(), rewards - rewards.mean(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.45])
def test_robust_dpo_is_unbiased_under_flipped_labels(noise: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (random_logprobs(20, seed=i) for i in range(4))
    robust = partial(robust_dpo, beta=0.3, label_smoothing=noise)
    mean_over_flips = (1 - noise) * robust(chosen, rejected, ref_chosen, ref_rejected) + noise * robust(
        rejected, chosen, ref_rejected, ref_chosen
    )
    clean = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    torch.testing.assert_close(mean_over_flips, clean, rtol=1e-11, atol=1e-11)


def test_only_robust_dpo_sees_through_flipped_labels() -> None:
    """On labels flipped with rate 0.2 robust DPO ends at π*, plain and conservative DPO elsewhere."""
    beta, noise = 0.5, 0.2
    rewards, ref, first_wins, weights = preference_problem(seed=13)
    flipped = (1 - noise) * first_wins + noise * (1 - first_wins)
    optimum, _ = kl_regularized_optimum(ref, rewards, beta)

    def distance(loss: PairLoss) -> float:
        def population(logits: Tensor) -> Tensor:
            logprobs = logits.log_softmax(-1)
            return both_labels(lambda w, r: loss(logprobs[w], logprobs[r], ref[w], ref[r]), flipped, weights)

        return (newton(population, ref).log_softmax(-1) - optimum).abs().max().item()

    assert distance(partial(robust_dpo, beta=beta, label_smoothing=noise)) < 1e-9
    assert distance(partial(dpo, beta=beta)) > 0.1
    assert distance(partial(conservative_dpo, beta=beta, label_smoothing=noise)) > 0.1


def test_conservative_dpo_stops_at_its_margin() -> None:
    margin = t(math.log(0.8 / 0.2)).requires_grad_()
    zero = t(0)
    (gradient,) = torch.autograd.grad(conservative_dpo(margin, zero, zero, zero, beta=1.0, label_smoothing=0.2), margin)
    assert gradient.item() == pytest.approx(0, abs=1e-15)


def test_ipo_ends_at_its_closed_form_for_any_preferences() -> None:
    """π* ∝ π_ref·exp(p(y ≻ μ)/β), for preferences that no scores explain: they run in a circle."""
    beta = 0.7
    ref = random_normal(4, seed=1).log_softmax(-1)
    data = random_normal(4, seed=2).softmax(-1)  # μ, from which both completions of a pair are drawn
    wins = torch.full((4, 4), 0.5, dtype=torch.float64)
    for better, worse, probability in ((0, 1, 0.9), (1, 2, 0.8), (2, 0, 0.7), (0, 3, 0.6), (3, 1, 0.55), (2, 3, 0.95)):
        wins[better, worse], wins[worse, better] = probability, 1 - probability
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(-1)

    def population(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        losses = ipo(logprobs[first], logprobs[second], ref[first], ref[second], beta=beta)
        return (2 * data[first] * data[second] * wins[first, second] * losses).sum()

    closed_form = (ref + wins @ data / beta).log_softmax(-1)
    torch.testing.assert_close(newton(population, ref).log_softmax(-1), closed_form, rtol=0, atol=1e-10)


# --- numbers that overflow, lists with holes, mistakes ---------------------------------------------------------------


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("name", [*WITH_REFERENCE, *WITHOUT_REFERENCE])
def test_extreme_log_ratios_stay_finite(name: str, gap: float) -> None:
    loss = (WITH_REFERENCE | WITHOUT_REFERENCE)[name]
    chosen = torch.full((4,), -3e4 + gap, requires_grad=True)
    rejected = torch.full((4,), -3e4 - gap, requires_grad=True)
    reference = [torch.full((4,), -3e4)] * 2 if name in WITH_REFERENCE else []
    losses = loss(chosen, rejected, *reference)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert losses.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_extreme_scores_lose_no_digits() -> None:
    """In float32 a lead of 1 between scores of 1e4 is still a lead of 1, and a hopeless lead is exactly linear."""
    expected = -math.log1p(math.exp(-1))
    for offset in (1e4, -1e4):
        scores = torch.tensor([offset + 1, offset])
        assert bradley_terry_logprob(scores[0], scores[1]).item() == pytest.approx(expected, rel=1e-6)
        assert plackett_luce_logprob(scores).item() == pytest.approx(expected, rel=1e-6)
    assert plackett_luce_logprob(torch.tensor([-1e4, 0.0, 1e4])).item() == -2e4 - 1e4
    assert plackett_luce_logprob(torch.tensor([1e4, 0.0, -1e4])).item() == 0


def test_a_certain_completion_has_finite_odds() -> None:
    """Log-probabilities that round to 0 (probability 1) give a finite loss and gradient."""
    certain, other = torch.zeros(4, requires_grad=True), torch.full((4,), -8.0, requires_grad=True)
    for pair in ((certain, other), (other, certain)):
        losses = orpo(*pair, coef=1.0, **LENGTHS)
        gradients = torch.autograd.grad(losses.sum(), pair)
        assert losses.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_log_odds_are_exact_at_both_ends() -> None:
    """Against a completion of even odds the loss is exactly −log p, near p = 1 as near p = 0."""
    one = {"chosen_lengths": torch.ones(2), "rejected_lengths": torch.ones(2)}
    even = t(-math.log(2), -math.log(2))
    assert odds_ratio_loss(t(-1e-9, -50), even, **one).tolist() == pytest.approx([1e-9, 50], rel=1e-13)


def test_masked_entries_take_no_part() -> None:
    scores = torch.tensor([[2.0, 1.0, -1.0, math.nan], [0.5, math.inf, 0.2, 0.1], [3.0, math.nan, math.nan, 1.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    scores.requires_grad_()
    logprobs = plackett_luce_logprob(scores, mask)
    expected = [
        plackett_luce_logprob(torch.tensor([2.0, 1.0, -1.0])).item(),
        plackett_luce_logprob(torch.tensor([0.5, 0.2, 0.1])).item(),
        0.0,
    ]
    assert logprobs.tolist() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(reward_model_loss(scores, centering_coef=0.1, mask=mask).sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    ref = torch.full_like(scores, math.nan).masked_fill(mask, -1.0)
    masked = plackett_luce_dpo(scores, ref, beta=0.5, mask=mask)[1]
    short = plackett_luce_dpo(torch.tensor([0.5, 0.2, 0.1]), torch.full((3,), -1.0), beta=0.5)
    assert masked.item() == pytest.approx(short.item(), rel=1e-6)


def test_a_list_without_entries_counts_nothing() -> None:
    empty = torch.zeros(1, 3, dtype=torch.bool)
    assert reward_model_loss(torch.randn(1, 3), centering_coef=0.1, mask=empty).item() == 0


def test_losses_come_back_unreduced_for_any_batch_shape() -> None:
    four = [random_logprobs(2, 3, seed=i) for i in range(4)]
    assert dpo(*four, beta=0.1).shape == (2, 3)
    assert plackett_luce_logprob(random_normal(2, 3, 4)).shape == (2, 3)
    assert dpo(*[x[0, 0] for x in four], beta=0.1).shape == ()


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("beta must be positive", lambda: dpo(ONE, ONE, ONE, ONE, beta=0.0)),
        ("beta must be positive", lambda: ipo(ONE, ONE, ONE, ONE, beta=math.nan)),
        ("beta must be positive", lambda: hinge(ONE, ONE, ONE, ONE, beta=-1.0)),
        ("beta must be positive", lambda: implicit_rewards(ONE, ONE, 0.0)),
        ("label_smoothing must lie", lambda: robust_dpo(ONE, ONE, ONE, ONE, beta=1.0, label_smoothing=0.5)),
        ("label_smoothing must lie", lambda: conservative_dpo(ONE, ONE, ONE, ONE, beta=1.0, label_smoothing=-0.1)),
        ("both completions or of neither", lambda: ipo(ONE, ONE, ONE, ONE, beta=1.0, chosen_lengths=ONE)),
        ("alpha must not be", lambda: rpo(ONE, ONE, ONE, ONE, beta=1.0, alpha=-1.0, chosen_lengths=ONE)),
        (
            "margin must not be",
            lambda: simpo(ONE, ONE, beta=1.0, margin=-1.0, chosen_lengths=ONE, rejected_lengths=ONE),
        ),
        ("coef must not be", lambda: orpo(ONE, ONE, coef=-1.0, chosen_lengths=ONE, rejected_lengths=ONE)),
        ("centering_coef must not be", lambda: reward_model_loss(torch.ones(1, 2), centering_coef=-1.0)),
        ("at least one entry", lambda: plackett_luce_logprob(torch.ones(3, 0))),
    ],
)
def test_settings_out_of_range_are_named(message: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
