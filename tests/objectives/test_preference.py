"""Preference losses: goldens, gradients, identities, and the exact minimisers of their population losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from trueup.objectives.logprobs import sequence_logprobs
from trueup.objectives.optimum import kl_regularized_optimum
from trueup.objectives.pointwise import apo_zero, sppo
from trueup.objectives.preference import (
    MAX_EXPONENT,
    Divergence,
    aot,
    aot_unpaired,
    apo_down,
    bradley_terry_logprob,
    conservative_dpo,
    discopop,
    divergence_rewards,
    dpo,
    dpo_by_index,
    exo,
    hinge,
    implicit_rewards,
    ipo,
    length_desensitized_logprobs,
    match_ranks,
    plackett_luce_dpo,
    plackett_luce_logprob,
    reward_model_loss,
    robust_dpo,
    rpo,
    wpo_weights,
)

PairLoss = Callable[[Tensor, Tensor], Tensor]

MARGIN_LOSSES: dict[str, PairLoss] = {
    "dpo": partial(dpo, beta=0.7),
    "conservative": partial(conservative_dpo, beta=0.7, label_smoothing=0.2),
    "robust": partial(robust_dpo, beta=0.7, label_smoothing=0.2),
    "exo": partial(exo, beta=0.7, label_smoothing=0.2),
    "ipo": partial(ipo, beta=0.7),
    "hinge": partial(hinge, beta=0.7),
    "discopop": partial(discopop, beta=0.7, tau=0.3),
}
"""Those that see only the difference of the log-ratios."""
PAIR_LOSSES = MARGIN_LOSSES | {
    "apo_down": partial(apo_down, beta=0.7),
    "rpo": lambda chosen, rejected: rpo(chosen, rejected, chosen / 3, beta=0.7, alpha=1.3),
}
DIVERGENCES: list[tuple[Divergence, float]] = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("jensen_shannon", 0.5),
    ("alpha", 0.3),
    ("alpha", 0.8),
]


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random_logprobs(*shape: int, seed: int = 0) -> Tensor:
    return -10 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 0.5


def random_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_pair(size: int) -> tuple[Tensor, Tensor]:
    return 3 * random_normal(size), 3 * random_normal(size, seed=1)


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
    # a list of one has no ranking to learn, and a score to centre
    alone = reward_model_loss(t(3, 99), centering_coef=0.1, mask=torch.tensor([True, False]))
    assert alone.item() == pytest.approx(3.6)


def test_margin_of_a_list_is_the_lead_of_its_first() -> None:
    # log-weights 1, 2, 3 with the first divided by e^m: stage one is 1/(1 + 5e^m), stage two is unchanged, 2/5
    expected = -math.log(1 / (1 + 5 * math.e) * 2 / 5)
    assert reward_model_loss(t(1, 2, 3).log(), margin=t(1).squeeze()).item() == pytest.approx(expected)


def test_plackett_luce_dpo_golden() -> None:
    # implicit rewards log 1, log 2, log 3, log 4: the ranking of 1/105 above, whatever the reference
    logprobs, ref = t(1, 2, 3, 4).log() / 0.5 + t(-9, -7, -5, -3), t(-9, -7, -5, -3)
    assert plackett_luce_dpo(logprobs, ref, beta=0.5).item() == pytest.approx(math.log(105), rel=1e-14)


def test_pair_loss_goldens() -> None:
    pair = t(1), t(-2)  # log-ratios, so h = 3
    three_to_one = math.log(3) / 3  # with this β, β·h = log 3 and σ(β·h) = 3/4
    assert dpo(*pair, beta=three_to_one).item() == pytest.approx(-math.log(3 / 4))
    smoothed = conservative_dpo(*pair, beta=three_to_one, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(-0.75 * math.log(3 / 4) - 0.25 * math.log(1 / 4))
    robust = robust_dpo(*pair, beta=three_to_one, label_smoothing=0.25)
    assert robust.item() == pytest.approx((-0.75 * math.log(3 / 4) + 0.25 * math.log(1 / 4)) / 0.5)
    assert ipo(*pair, beta=0.25).item() == pytest.approx((3 - 2) ** 2)
    assert hinge(*pair, beta=0.1).item() == pytest.approx(0.7)
    assert hinge(*pair, beta=0.5).item() == 0
    assert rpo(*pair, t(-2.5), beta=three_to_one, alpha=2.0).item() == pytest.approx(-math.log(3 / 4) + 5)
    assert implicit_rewards(t(-5, -7), t(-6, -5), 0.1).tolist() == pytest.approx([0.1, -0.2])
    # KL((3/4, 1/4) ‖ (4/5, 1/5))
    assert exo(*pair, beta=three_to_one, label_smoothing=0.2).item() == pytest.approx(
        0.75 * math.log(0.75 / 0.8) + 0.25 * math.log(0.25 / 0.2)
    )
    # m = 3/4 of exp(−log 3) and 1/4 of −log(3/4)
    assert discopop(*pair, beta=three_to_one, tau=1.0).item() == pytest.approx(0.75 / 3 - 0.25 * math.log(3 / 4))
    # σ(β·u_w) with β·u_w = −log 3, and 1 − σ(β·h) with β·h = log 3
    assert apo_down(t(-1), t(-2), beta=math.log(3)).item() == pytest.approx(1 / 4 + 1 / 4)
    assert aot(t(-4), t(-7), beta=three_to_one).item() == pytest.approx(-math.log(3 / 4))
    assert aot(t(-4), t(-7), beta=three_to_one, label_smoothing=0.25).item() == pytest.approx(smoothed.item())
    # what is seen at odds of 3 to 1 from the chosen end, and at even odds from the rejected end
    ends = aot_unpaired(t(-4), t(2), chosen_matched=t(-7), rejected_matched=t(-2), beta=three_to_one)
    assert ends.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2)


def test_discopop_turns_where_the_paper_says() -> None:
    """At β = τ = 0.05 the published loss has its stationary points at margins of −2.3714 and 1.44012."""
    margins = t(-2.3714, 1.44012).requires_grad_()
    slope = torch.autograd.grad(discopop(margins, t(0, 0), beta=0.05, tau=0.05).sum(), margins, create_graph=True)[0]
    (curvature,) = torch.autograd.grad(slope.sum(), margins)
    assert (slope / curvature).abs().max() < 1e-5  # to the last published digit
    assert curvature[0] > 0 > curvature[1]


def test_divergence_rewards_golden() -> None:
    ratio_two = t(math.log(2))
    expected = {"reverse_kl": math.log(2), "forward_kl": 1 - 1 / 2, "jensen_shannon": math.log(4 / 3)}
    for divergence, value in expected.items():
        assert divergence_rewards(ratio_two, divergence).item() == pytest.approx(value, rel=1e-15)
    assert divergence_rewards(ratio_two, "alpha", alpha=0.5).item() == pytest.approx(2 - math.sqrt(2), rel=1e-15)
    assert divergence_rewards(ratio_two, "alpha").item() == pytest.approx(2 - math.sqrt(2), rel=1e-15)


def test_ranks_golden() -> None:
    assert match_ranks(t(3, -1, 2, 9), t(10, 40, 20, 30)).tolist() == [30, 10, 20, 40]


def test_weight_golden() -> None:
    # a token of probability ½ from (½, ¼, ¼), whose squares sum to 3/8: 4/3; one of ¼: 2/3; masked ones don't count
    logprobs = t(1 / 2, 1 / 4, 1 / 4).log().expand(2, 3)
    mask = torch.tensor([[True, True, False], [False, False, True]])
    weights = wpo_weights(logprobs, mask, torch.full((2, 3), math.log(3 / 8), dtype=torch.float64))
    assert weights.tolist() == pytest.approx([math.sqrt(4 / 3 * 2 / 3), 2 / 3], rel=1e-15)
    assert wpo_weights(t(-1), torch.tensor([False]), t(-2)).item() == 1


def test_length_desensitized_golden() -> None:
    # three scored tokens about a gap, two of them shared
    logprobs, mask = t(-1, -64, -2, -4), torch.tensor([True, False, True, True])
    assert length_desensitized_logprobs(logprobs, mask, torch.tensor(2), alpha=0.25).item() == -1 - 2 - 0.25 * 4


def test_start_of_training_is_log_two() -> None:
    assert dpo(torch.zeros(4), torch.zeros(4), beta=0.1).tolist() == pytest.approx([math.log(2)] * 4)


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradients_of_pair_losses(name: str) -> None:
    assert torch.autograd.gradcheck(PAIR_LOSSES[name], [x.requires_grad_() for x in random_pair(5)])


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
def test_gradients_of_divergence_rewards(divergence: Divergence, alpha: float) -> None:
    log_ratios = (3 * random_normal(5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: divergence_rewards(u, divergence, alpha=alpha), log_ratios)


def whole_aot_unpaired(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Matched anew for every argument: the matches take no gradient, and need none."""
    return aot_unpaired(
        chosen,
        rejected,
        chosen_matched=match_ranks(chosen, rejected),
        rejected_matched=match_ranks(-rejected, -chosen),
        beta=0.7,
        label_smoothing=0.1,
    )


def test_gradients_of_aot_and_desensitized_logprobs() -> None:
    values, targets = random_pair(5)
    values.requires_grad_()
    matched = match_ranks(values, targets)
    assert torch.autograd.gradcheck(lambda v: aot(v, matched, beta=0.7, label_smoothing=0.1), values)
    sides = tuple(side.requires_grad_() for side in random_pair(5))
    assert torch.autograd.gradcheck(lambda *sides: whole_aot_unpaired(*sides).sum(), sides)
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    shared = torch.tensor([2, 3])
    logprobs = random_logprobs(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: length_desensitized_logprobs(p, mask, shared, alpha=0.3), logprobs)


def test_matches_and_weights_take_no_gradient() -> None:
    chosen, rejected = (x.requires_grad_() for x in random_pair(5))
    assert not match_ranks(chosen, rejected).requires_grad
    assert torch.autograd.grad(aot(chosen, rejected, beta=0.7).sum(), (chosen, rejected), allow_unused=True)[1] is None
    mask = torch.ones(5, dtype=torch.bool)
    assert not wpo_weights(chosen, mask, rejected).requires_grad


def test_gradients_of_ranked_losses() -> None:
    scores, margin = random_normal(3, 4).requires_grad_(), random_normal(3, seed=1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(bradley_terry_logprob, (scores[:, 0], scores[:, 1]))
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
    log_ratios = logits.log_softmax(-1) - ref
    (gradient,) = torch.autograd.grad(dpo(log_ratios[chosen], log_ratios[rejected], beta=beta).sum(), logits)
    rewards = beta * log_ratios.detach()
    score_function = torch.eye(5, dtype=torch.float64) - logits.detach().softmax(-1)  # row y: ∇_logits log π(y)
    weights = -beta * torch.sigmoid(rewards[rejected] - rewards[chosen])
    expected = (weights[:, None] * (score_function[chosen] - score_function[rejected])).sum(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)


def test_hinge_has_no_gradient_beyond_its_margin() -> None:
    chosen = t(5, -0.9).requires_grad_()
    (gradient,) = torch.autograd.grad(hinge(chosen, t(0, 0), beta=1.0).sum(), chosen)
    assert gradient.tolist() == [0, -1]


def test_exo_lets_a_badly_wrong_pair_be() -> None:
    """Reverse KL has its gradient near its target; forward KL, cDPO, pulls hardest where the pair is most wrong."""
    margin = t(-20).requires_grad_()
    reverse, forward = (
        torch.autograd.grad(loss(margin, t(0), beta=1.0, label_smoothing=0.2), margin)[0].item()
        for loss in (exo, conservative_dpo)
    )
    assert -1e-6 < reverse < 0
    assert forward == pytest.approx(-0.8, abs=1e-6)


def test_apo_down_starts_with_the_rejected_and_takes_the_chosen_along() -> None:
    chosen, rejected = t(0, 1).requires_grad_(), t(0, -1).requires_grad_()
    gradients = torch.autograd.grad(apo_down(chosen, rejected, beta=0.8).sum(), (chosen, rejected))
    assert gradients[0][0].item() == pytest.approx(0, abs=1e-16)
    assert gradients[1][0].item() == pytest.approx(0.8 / 4)
    assert (gradients[0][1] > 0).item()


# --- identities --------------------------------------------------------------------------------------------------


def test_two_ranked_are_bradley_terry_to_the_bit() -> None:
    scores, ref = random_normal(50, 2), random_normal(50, 2, seed=1)
    assert torch.equal(plackett_luce_logprob(scores), bradley_terry_logprob(scores[:, 0], scores[:, 1]))
    assert torch.equal(reward_model_loss(scores), -bradley_terry_logprob(scores[:, 0], scores[:, 1]))
    ours = plackett_luce_dpo(scores, ref, beta=0.3)
    torch.testing.assert_close(ours, dpo(*(scores - ref).unbind(-1), beta=0.3), rtol=1e-13, atol=0)


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
    pair = random_pair(6)
    plain = dpo(*pair, beta=0.2)
    assert torch.equal(conservative_dpo(*pair, beta=0.2, label_smoothing=0.0), plain)
    assert torch.equal(robust_dpo(*pair, beta=0.2, label_smoothing=0.0), plain)
    assert torch.equal(rpo(*pair, random_logprobs(6), beta=0.2, alpha=0.0), plain)


def test_exo_and_conservative_dpo_are_the_two_divergences_of_one_pair() -> None:
    """KL(q ‖ p) and KL(p ‖ q) + H(p), with q the policy's choice and p the softened label."""
    pair, noise = random_pair(6), 0.2
    q = torch.sigmoid(0.7 * (pair[0] - pair[1]))
    q, label = torch.stack([q, 1 - q], -1), t(1 - noise, noise)
    reverse = (q * (q.log() - label.log())).sum(-1)
    cross_entropy = -(label * q.log()).sum(-1)
    torch.testing.assert_close(exo(*pair, beta=0.7, label_smoothing=noise), reverse, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(
        conservative_dpo(*pair, beta=0.7, label_smoothing=noise), cross_entropy, rtol=1e-11, atol=0
    )


def test_discopop_blends_a_logistic_and_an_exponential_loss() -> None:
    pair = random_pair(6)
    z = 0.7 * (pair[0] - pair[1])
    modulation = torch.sigmoid(z / 0.3)
    blend = (1 - modulation) * softplus(-z) + modulation * torch.exp(-z)
    torch.testing.assert_close(discopop(*pair, beta=0.7, tau=0.3), blend, rtol=1e-12, atol=0)
    # a small τ switches
    limit = torch.where(z > 0, torch.exp(-z), softplus(-z))
    torch.testing.assert_close(discopop(*pair, beta=0.7, tau=1e-6), limit, rtol=1e-12, atol=0)


def test_apo_down_anchors_the_chosen_and_compares_the_pair() -> None:
    chosen, rejected = random_pair(6)
    good = torch.ones(6, dtype=torch.bool)
    anchored = apo_zero(chosen, ~good, beta=0.7) + apo_zero(chosen - rejected, good, beta=0.7)
    torch.testing.assert_close(apo_down(chosen, rejected, beta=0.7), anchored, rtol=1e-13, atol=0)


def test_hinge_is_a_logistic_loss_that_is_infinitely_sharp() -> None:
    """−log σ(k·(z − 1))/k → max(0, 1 − z), never further away than log 2/k."""
    chosen, rejected = random_pair(20)
    sharp = dpo(chosen - 1 / 0.7, rejected, beta=0.7e6) / 1e6
    torch.testing.assert_close(sharp, hinge(chosen, rejected, beta=0.7), rtol=0, atol=math.log(2) / 1e6)


def test_ipo_is_sppo_of_the_margin_with_a_certain_win() -> None:
    chosen, rejected = random_pair(6)
    expected = sppo(chosen - rejected, torch.ones(6, dtype=torch.float64), beta=0.7)
    torch.testing.assert_close(ipo(chosen, rejected, beta=0.7), expected, rtol=1e-13, atol=0)


def test_aot_is_dpo_where_every_margin_has_the_rank_of_its_reference() -> None:
    margins, ref_margins = (each.sort().values for each in random_pair(6))
    ours = aot(margins, match_ranks(margins, ref_margins), beta=0.7)
    assert torch.equal(ours, dpo(margins, ref_margins, beta=0.7))
    alone = aot(margins[3:4], match_ranks(margins[3:4], ref_margins[:1]), beta=0.7)  # a batch of one
    assert torch.equal(alone, dpo(margins[3:4], ref_margins[:1], beta=0.7))


def test_a_margin_of_the_reward_model_is_points_off_the_first() -> None:
    scores, margin = random_normal(5, 3), random_normal(5, seed=1)
    handicapped = torch.cat([scores[:, :1] - margin[:, None], scores[:, 1:]], 1)
    assert torch.equal(reward_model_loss(scores, margin=margin), reward_model_loss(handicapped))


def test_dpo_is_the_reward_model_loss_of_implicit_rewards() -> None:
    logprobs, ref_logprobs = random_logprobs(6, 2), random_logprobs(6, 2, seed=1)
    rewards = implicit_rewards(logprobs, ref_logprobs, 0.3)
    losses = dpo(*(logprobs - ref_logprobs).unbind(-1), beta=0.3)
    torch.testing.assert_close(reward_model_loss(rewards), losses, rtol=1e-13, atol=0)


def test_what_every_prompt_adds_cancels() -> None:
    """A constant on both log-ratios of a pair changes no loss of their margin; an anchored loss sees it."""
    chosen, rejected = random_pair(4)
    for loss in MARGIN_LOSSES.values():
        torch.testing.assert_close(loss(chosen - 3, rejected - 3), loss(chosen, rejected))
    assert (apo_down(chosen - 3, rejected - 3, beta=0.7) - apo_down(chosen, rejected, beta=0.7)).abs().min() > 1e-3


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


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
def test_divergence_rewards_are_the_derivatives_of_their_divergence(divergence: Divergence, alpha: float) -> None:
    """g(u) = f'(e^u) − f'(1), f as in the docstring: by autograd through f."""
    log_ratios = 2 * random_normal(6)
    ratios = torch.cat([log_ratios.exp(), t(1)]).requires_grad_()
    (derivative,) = torch.autograd.grad(f_divergence(divergence, alpha)(ratios).sum(), ratios)
    ours = divergence_rewards(log_ratios, divergence, alpha=alpha)
    torch.testing.assert_close(ours, derivative[:-1] - derivative[-1], rtol=1e-11, atol=1e-13)
    assert divergence_rewards(t(0), divergence, alpha=alpha).item() == pytest.approx(0, abs=1e-15)


def test_alpha_goes_from_reverse_to_forward_kl() -> None:
    """Near both ends, and in float32 too: no digits are lost where α·u is tiny."""
    log_ratios = 3 * random_normal(6)
    for alpha, divergence in ((1e-7, "reverse_kl"), (1 - 1e-7, "forward_kl")):
        expected = divergence_rewards(log_ratios, divergence)
        torch.testing.assert_close(divergence_rewards(log_ratios, "alpha", alpha=alpha), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            divergence_rewards(log_ratios.float(), "alpha", alpha=alpha), expected.float(), rtol=1e-5, atol=0
        )


def test_exponential_goes_on_as_its_tangent() -> None:
    """Value and slope meet where the exponent reaches its bound, and the slope stays from there on."""
    edge = -MAX_EXPONENT / 0.5
    log_ratios = t(edge + 1e-9, edge - 1e-9, 10 * edge).requires_grad_()
    rewards = divergence_rewards(log_ratios, "alpha", alpha=0.5)
    (slopes,) = torch.autograd.grad(rewards.sum(), log_ratios)
    assert slopes.tolist() == pytest.approx([math.exp(MAX_EXPONENT)] * 3, rel=1e-8)
    assert rewards[0].item() == pytest.approx(rewards[1].item(), rel=1e-8)
    beyond = (1 - math.exp(MAX_EXPONENT)) / 0.5 + math.exp(MAX_EXPONENT) * 9 * edge
    assert rewards[2].item() == pytest.approx(beyond, rel=1e-12)


def test_length_desensitized_ends() -> None:
    logprobs = random_logprobs(3, 6).masked_fill(torch.eye(3, 6, dtype=torch.bool), math.nan)
    mask = ~torch.eye(3, 6, dtype=torch.bool)
    shared = torch.tensor([2, 5, 9])
    whole = sequence_logprobs(logprobs, mask)
    assert torch.equal(length_desensitized_logprobs(logprobs, mask, shared, alpha=1.0), whole)
    mixed = length_desensitized_logprobs(logprobs, mask, shared, alpha=0.3)
    torch.testing.assert_close(mixed[1:], whole[1:])  # nothing lies beyond five tokens
    cut = length_desensitized_logprobs(logprobs, mask, shared, alpha=0.0)
    torch.testing.assert_close(cut[0], logprobs[0, 1:3].sum())
    torch.testing.assert_close(mixed, 0.3 * whole + 0.7 * cut)


def test_a_completion_of_the_policy_weighs_one_on_average() -> None:
    logprobs = random_normal(50).log_softmax(-1)
    collisions = torch.full((50, 1), (2 * logprobs).logsumexp(-1).item(), dtype=torch.float64)
    weights = wpo_weights(logprobs[:, None], torch.ones(50, 1, dtype=torch.bool), collisions)
    assert (logprobs.exp() @ weights).item() == pytest.approx(1, rel=1e-13)


def test_matching_ranks_is_the_optimal_transport() -> None:
    """Of all 120 matchings none is cheaper under the convex cost; the order of the batch does not matter."""
    values, targets = random_pair(5)
    ours = aot(values, match_ranks(values, targets), beta=0.7, label_smoothing=0.1).sum()
    matchings = torch.tensor(list(itertools.permutations(range(5))))
    every = aot(values.expand(120, 5), targets[matchings], beta=0.7, label_smoothing=0.1).sum(-1)
    assert ours.item() == pytest.approx(every.min().item(), rel=1e-14)
    assert ours < every.sort().values[1]
    for order in matchings[::17]:
        assert torch.equal(match_ranks(values[order], targets), match_ranks(values, targets)[order])
        assert torch.equal(match_ranks(values, targets[order]), match_ranks(values, targets))


# --- expectations: exact population losses on enumerable response spaces --------------------------------------------


def f_divergence(divergence: Divergence, alpha: float) -> Callable[[Tensor], Tensor]:
    """f of Σ_y π_ref·f(π/π_ref)."""
    return {
        "reverse_kl": lambda x: x * x.log(),
        "forward_kl": lambda x: -x.log(),
        "jensen_shannon": lambda x: x * x.log() - (x + 1) * ((x + 1) / 2).log(),
        "alpha": lambda x: (x ** (1 - alpha) - (1 - alpha) * x - alpha) / (alpha * (alpha - 1)),
    }[divergence]


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_dpo_ends_at_the_kl_regularised_optimum(preferences: Any, newton: Any, beta: float) -> None:
    problem = preferences(3)

    def population(logits: Tensor) -> Tensor:
        log_ratios = logits.log_softmax(-1) - problem.ref
        return problem.loss(lambda w, r: dpo(log_ratios[w], log_ratios[r], beta=beta))

    minimiser = newton(population, problem.ref).log_softmax(-1)
    optimum, _ = kl_regularized_optimum(problem.ref, problem.rewards, beta)
    torch.testing.assert_close(minimiser, optimum, rtol=0, atol=1e-9)
    # and its implicit rewards are the true ones, up to a constant
    recovered = implicit_rewards(minimiser, problem.ref, beta)
    truth = problem.rewards - problem.rewards.mean()
    torch.testing.assert_close(recovered - recovered.mean(), truth, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
def test_f_dpo_ends_at_the_optimum_of_its_divergence(
    preferences: Any, newton: Any, divergence: Divergence, alpha: float
) -> None:
    """The minimiser has f'(π/π_ref) = r/β + const., and maximises E_π[r] − β·Σ π_ref·f(π/π_ref)."""
    problem, beta = preferences(3), 0.8
    f = f_divergence(divergence, alpha)

    def population(logits: Tensor) -> Tensor:
        rewards = divergence_rewards(logits.log_softmax(-1) - problem.ref, divergence, alpha=alpha)
        return problem.loss(lambda w, r: dpo(rewards[w], rewards[r], beta=beta))

    def negative_objective(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        return beta * (problem.ref.exp() * f((logprobs - problem.ref).exp())).sum() - logprobs.exp() @ problem.rewards

    minimiser = newton(population, problem.ref).log_softmax(-1)
    constant = divergence_rewards(minimiser - problem.ref, divergence, alpha=alpha) - problem.rewards / beta
    torch.testing.assert_close(constant, constant.mean().expand(5), rtol=0, atol=1e-9)
    torch.testing.assert_close(minimiser, newton(negative_objective, problem.ref).log_softmax(-1), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("loss", "rewards_margin"),
    [
        (dpo, lambda p: p.logit()),
        (partial(conservative_dpo, label_smoothing=0.1), lambda p: (0.1 + 0.8 * p).logit()),
        (partial(exo, label_smoothing=0.1), lambda p: (2 * p - 1) * math.log(9)),
        (ipo, lambda p: p - 0.5),
    ],
)
def test_where_the_margin_of_a_pair_ends(
    newton: Any, loss: Callable[..., Tensor], rewards_margin: Callable[[Tensor], Tensor]
) -> None:
    """Of a pair that is labelled right with probability p: β·h as the docs' table has it."""
    probability, beta = t(0.1, 0.5, 0.7, 0.99), 0.6

    def population(margins: Tensor) -> Tensor:
        either = probability * loss(margins, t(0, 0, 0, 0), beta=beta) + (1 - probability) * loss(
            t(0, 0, 0, 0), margins, beta=beta
        )
        return either.sum()

    torch.testing.assert_close(beta * newton(population, t(0, 0, 0, 0)), rewards_margin(probability), rtol=0, atol=1e-9)


@pytest.mark.parametrize("probability", [0.51, 0.7, 0.99])
def test_hinge_ends_at_one_whichever_label_is_the_likelier(probability: float) -> None:
    """Its expected slope changes sign at z = 1 (at −1 where the pair is labelled wrong more often), and only there."""
    beta = 0.6
    margins = (torch.linspace(-3, 3, 61, dtype=torch.float64) + 0.05).requires_grad_()
    zero = torch.zeros_like(margins)
    for share, turn in ((probability, 1), (1 - probability, -1)):
        expected = share * hinge(margins / beta, zero, beta=beta) + (1 - share) * hinge(zero, margins / beta, beta=beta)
        (slope,) = torch.autograd.grad(expected.sum(), margins)
        assert torch.equal(slope > 0, margins > turn)
        assert torch.equal(slope < 0, margins < turn)


def test_sharp_discopop_ends_where_an_exponential_and_a_logistic_slope_balance(newton: Any) -> None:
    """τ → 0: p·e^(−z) = (1 − p)·σ(z), so e^(−z) = (√(1 + 4·(1 − p)/p) − 1)/2 for a pair that is right with p > ⅔."""
    probability, beta, nothing = t(0.7, 0.9, 0.999), 0.6, t(0, 0, 0)
    loss = partial(discopop, beta=beta, tau=1e-6)

    def population(z: Tensor) -> Tensor:
        return (probability * loss(z / beta, nothing) + (1 - probability) * loss(nothing, z / beta)).sum()

    closed_form = -torch.log(((1 + 4 * (1 - probability) / probability).sqrt() - 1) / 2)
    assert (closed_form > 0).all()
    torch.testing.assert_close(newton(population, t(1, 2, 5)), closed_form, rtol=0, atol=1e-10)


def test_apo_down_lowers_both_sides_of_a_pair_that_is_not_certain() -> None:
    """In the mean over its label, right with p, a pair (a, b) has these slopes: both positive at the reference."""
    probability, beta = t(0.6, 0.8, 0.95, 1), 0.6

    def slopes(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        expected = probability * apo_down(a, b, beta=beta) + (1 - probability) * apo_down(b, a, beta=beta)
        return torch.autograd.grad(expected.sum(), (a, b))

    def bell(x: Tensor) -> Tensor:
        return beta * torch.sigmoid(beta * x) * torch.sigmoid(-beta * x)

    a, b = random_pair(4)
    ours, compared = slopes(a, b), (2 * probability - 1) * bell(a - b)
    torch.testing.assert_close(ours[0], probability * bell(a) - compared, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(ours[1], (1 - probability) * bell(b) + compared, rtol=1e-12, atol=1e-16)
    at_reference = slopes(t(0, 0, 0, 0), t(0, 0, 0, 0))
    torch.testing.assert_close(at_reference[0], beta / 4 * (1 - probability), rtol=0, atol=1e-16)
    torch.testing.assert_close(at_reference[1], beta / 4 * probability, rtol=1e-14, atol=0)


@pytest.mark.parametrize("alpha", [0.1, 3.0])
def test_rpo_ends_where_the_chosen_are_drawn_from_if_that_is_dpo_s_optimum(
    preferences: Any, newton: Any, alpha: float
) -> None:
    """The likelihood is at its best at the distribution q of chosen completions (of one token). With the reference
    q·exp(−r/β) so is DPO, and their sum ends there for every α; with another reference it ends between the two."""
    problem, beta = preferences(3), 0.8
    drawn = torch.zeros(5, dtype=torch.float64)
    drawn.index_add_(0, problem.first, problem.weights * problem.first_wins)
    drawn.index_add_(0, problem.second, problem.weights * (1 - problem.first_wins))
    chosen = (drawn / drawn.sum()).log()

    def minimiser(ref: Tensor) -> Tensor:
        def population(logits: Tensor) -> Tensor:
            logprobs = logits.log_softmax(-1)
            u = logprobs - ref
            return problem.loss(lambda w, r: rpo(u[w], u[r], logprobs[w], beta=beta, alpha=alpha))

        return newton(population, ref).log_softmax(-1)

    torch.testing.assert_close(minimiser((chosen - problem.rewards / beta).log_softmax(-1)), chosen, rtol=0, atol=1e-9)
    elsewhere = minimiser(problem.ref)
    optimum, _ = kl_regularized_optimum(problem.ref, problem.rewards, beta)
    assert (elsewhere - chosen).abs().max() > 0.01
    assert (elsewhere - optimum).abs().max() > 0.01


def test_aot_lifts_every_quantile_by_the_same(newton: Any) -> None:
    """With softened labels the sorted values end log((1 − ε)/ε)/β above the sorted targets."""
    start, targets = random_normal(6), random_normal(6, seed=1)
    beta, noise = 0.7, 0.2

    def population(values: Tensor) -> Tensor:
        return aot(values, match_ranks(values, targets), beta=beta, label_smoothing=noise).sum()

    ended = newton(population, start)
    lift = math.log((1 - noise) / noise) / beta
    torch.testing.assert_close(ended.sort().values, targets.sort().values + lift, rtol=0, atol=1e-9)


def test_plackett_luce_dpo_ends_at_the_kl_regularised_optimum(newton: Any) -> None:
    beta, rewards, ref = 0.5, random_normal(4, seed=5), random_normal(4, seed=6).log_softmax(-1)
    rankings = torch.tensor(list(itertools.permutations(range(4), 3)))  # all ranked triples of four responses
    frequency = plackett_luce_logprob(rewards[rankings]).exp()

    def population(logits: Tensor) -> Tensor:
        losses = plackett_luce_dpo(logits.log_softmax(-1)[rankings], ref[rankings], beta=beta)
        return (frequency * losses).sum()

    optimum, _ = kl_regularized_optimum(ref, rewards, beta)
    torch.testing.assert_close(newton(population, ref).log_softmax(-1), optimum, rtol=0, atol=1e-9)


def score_differences(problem: Any, newton: Any, **options: float) -> tuple[Tensor, Tensor]:
    """What a reward model with one free score per response recovers from all pairs, and the truth."""
    margin = torch.full((len(problem.first),), options.pop("margin", 0.0), dtype=torch.float64)

    def population(scores: Tensor) -> Tensor:
        return problem.loss(
            lambda w, r: reward_model_loss(torch.stack([scores[w], scores[r]], -1), margin=margin, **options)
        )

    scores = newton(population, torch.zeros(len(problem.rewards), dtype=torch.float64))
    return scores - scores.mean(), problem.rewards - problem.rewards.mean()


def test_reward_model_recovers_score_differences(preferences: Any, newton: Any) -> None:
    recovered, truth = score_differences(preferences(8), newton)
    torch.testing.assert_close(recovered, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"centering_coef": 0.05}, {"margin": 0.5}])
def test_centring_and_margin_bias_score_differences(preferences: Any, newton: Any, options: dict[str, float]) -> None:
    recovered, truth = score_differences(preferences(8), newton, **options)
    assert (recovered - truth).abs().max() > 0.05


def test_ranked_reward_model_recovers_score_differences(newton: Any) -> None:
    rewards = random_normal(4, seed=11)
    rankings = torch.tensor(list(itertools.permutations(range(4))))
    frequency = plackett_luce_logprob(rewards[rankings]).exp()
    scores = newton(lambda s: (frequency * reward_model_loss(s[rankings])).sum(), torch.zeros_like(rewards))
    torch.testing.assert_close(scores - scores.mean(), rewards - rewards.mean(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.45])
def test_robust_dpo_is_unbiased_under_flipped_labels(noise: float) -> None:
    chosen, rejected = random_pair(20)
    robust = partial(robust_dpo, beta=0.3, label_smoothing=noise)
    mean_over_flips = (1 - noise) * robust(chosen, rejected) + noise * robust(rejected, chosen)
    torch.testing.assert_close(mean_over_flips, dpo(chosen, rejected, beta=0.3), rtol=1e-11, atol=1e-11)


def test_only_robust_dpo_sees_through_flipped_labels(preferences: Any, newton: Any) -> None:
    """On labels flipped with rate 0.2 robust DPO ends at π*, plain and conservative DPO elsewhere."""
    beta, noise, problem = 0.5, 0.2, preferences(13)
    flipped = problem._replace(first_wins=(1 - noise) * problem.first_wins + noise * (1 - problem.first_wins))
    optimum, _ = kl_regularized_optimum(problem.ref, problem.rewards, beta)

    def distance(loss: PairLoss) -> float:
        def population(logits: Tensor) -> Tensor:
            log_ratios = logits.log_softmax(-1) - problem.ref
            return flipped.loss(lambda w, r: loss(log_ratios[w], log_ratios[r]))

        return (newton(population, problem.ref).log_softmax(-1) - optimum).abs().max().item()

    assert distance(partial(robust_dpo, beta=beta, label_smoothing=noise)) < 1e-9
    assert distance(partial(dpo, beta=beta)) > 0.1
    assert distance(partial(conservative_dpo, beta=beta, label_smoothing=noise)) > 0.1


@pytest.mark.parametrize("loss", [conservative_dpo, exo])
def test_softened_labels_stop_at_their_margin(loss: Callable[..., Tensor]) -> None:
    margin = t(math.log(0.8 / 0.2)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(margin, t(0), beta=1.0, label_smoothing=0.2), margin)
    assert gradient.item() == pytest.approx(0, abs=1e-15)


def test_ipo_ends_at_its_closed_form_for_any_preferences(newton: Any) -> None:
    """π* ∝ π_ref·exp(p(y ≻ μ)/β), for preferences that no scores explain: they run in a circle."""
    beta = 0.7
    ref = random_normal(4, seed=1).log_softmax(-1)
    data = random_normal(4, seed=2).softmax(-1)  # μ, from which both completions of a pair are drawn
    wins = torch.full((4, 4), 0.5, dtype=torch.float64)
    for better, worse, probability in ((0, 1, 0.9), (1, 2, 0.8), (2, 0, 0.7), (0, 3, 0.6), (3, 1, 0.55), (2, 3, 0.95)):
        wins[better, worse], wins[worse, better] = probability, 1 - probability
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(-1)

    def population(logits: Tensor) -> Tensor:
        log_ratios = logits.log_softmax(-1) - ref
        losses = ipo(log_ratios[first], log_ratios[second], beta=beta)
        return (2 * data[first] * data[second] * wins[first, second] * losses).sum()

    closed_form = (ref + wins @ data / beta).log_softmax(-1)
    torch.testing.assert_close(newton(population, ref).log_softmax(-1), closed_form, rtol=0, atol=1e-10)


# --- invariance: micro-batches, shapes -----------------------------------------------------------------------------


FEATURES = random_normal(7, 3), random_normal(7, 3, seed=1)
"""What a policy with three parameters makes of the chosen and of the rejected completions."""


def test_micro_batches_of_paired_aot_add_up_to_the_batch() -> None:
    parameters, ref_margins = random_normal(3, seed=2).requires_grad_(), random_normal(7, seed=3)
    margins = (FEATURES[0] - FEATURES[1]) @ parameters
    matched = match_ranks(margins, ref_margins)
    # the loss of the whole batch as the paper has it: both sides sorted
    sorted_losses = -logsigmoid(0.7 * (margins.sort().values - ref_margins.sort().values))
    (whole,) = torch.autograd.grad(sorted_losses.mean(), parameters)
    parts = torch.zeros(3, dtype=torch.float64)
    for rows in torch.arange(7).split(3):
        values = (FEATURES[0][rows] - FEATURES[1][rows]) @ parameters
        parts += torch.autograd.grad(aot(values, matched[rows], beta=0.7).sum() / 7, parameters)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-15)


def test_micro_batches_of_unpaired_aot_add_up_to_the_batch() -> None:
    """Both sides move; each takes its matches from the whole batch, and value and gradient are those of the batch."""
    parameters = random_normal(3, seed=2).requires_grad_()
    chosen, rejected = (features @ parameters for features in FEATURES)
    sorted_losses = -logsigmoid(0.7 * (chosen.sort().values - rejected.sort().values))
    (whole,) = torch.autograd.grad(sorted_losses.mean(), parameters, retain_graph=True)
    above, below = match_ranks(chosen, rejected), match_ranks(-rejected, -chosen)
    parts, value = torch.zeros(3, dtype=torch.float64), 0.0
    for chosen_rows, rejected_rows in zip(torch.arange(7).split(3), torch.randperm(7).split(3), strict=True):
        losses = aot_unpaired(
            FEATURES[0][chosen_rows] @ parameters,
            FEATURES[1][rejected_rows] @ parameters,
            chosen_matched=above[chosen_rows],
            rejected_matched=below[rejected_rows],
            beta=0.7,
        )
        parts += torch.autograd.grad(losses.sum() / 7, parameters)[0]
        value += losses.sum().item() / 7
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-15)
    assert value == pytest.approx(sorted_losses.mean().item(), rel=1e-13)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_come_back_unreduced_for_any_batch_shape(name: str) -> None:
    chosen, rejected = random_pair(6)
    flat = PAIR_LOSSES[name](chosen, rejected)
    assert flat.shape == (6,)
    assert torch.equal(PAIR_LOSSES[name](chosen.view(2, 3), rejected.view(2, 3)), flat.view(2, 3))
    assert torch.equal(PAIR_LOSSES[name](chosen[0], rejected[0]), flat[0])


RANKED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plackett_luce_logprob": lambda scores, margin, mask: plackett_luce_logprob(scores, mask),
    "reward_model_loss": lambda scores, margin, mask: reward_model_loss(
        scores, margin=margin, centering_coef=0.2, mask=mask
    ),
    "plackett_luce_dpo": lambda scores, margin, mask: plackett_luce_dpo(
        scores, scores.detach().sin(), beta=0.7, mask=mask
    ),
}


@pytest.mark.parametrize("name", RANKED)
def test_lists_are_judged_one_by_one_and_micro_batches_add_up(name: str) -> None:
    """Whatever stands beside a list, in whatever order, and however wide the batch is: its loss and its gradient."""
    scores, margin = random_normal(6, 4).requires_grad_(), random_normal(6, seed=1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    whole = RANKED[name](scores, margin, mask)
    (gradient,) = torch.autograd.grad(whole.sum() / 6, scores)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(RANKED[name](scores[order], margin[order], mask[order]), whole[order])
    added = torch.zeros_like(scores)
    for rows in order.split([1, 3, 2]):
        width = int(mask[rows].sum(-1).max())
        losses = RANKED[name](scores[rows, :width], margin[rows], mask[rows, :width])
        torch.testing.assert_close(losses, whole[rows], rtol=1e-12, atol=1e-14)
        added += torch.autograd.grad(losses.sum() / 6, scores)[0]
    torch.testing.assert_close(added, gradient, rtol=1e-12, atol=1e-14)


def test_ranked_losses_take_any_batch_shape() -> None:
    assert plackett_luce_logprob(random_normal(2, 3, 4)).shape == (2, 3)


def test_pairs_by_index_are_judged_one_by_one() -> None:
    """In whatever order completions and pairs are given, and in parts that add up."""
    pi, ref = random_logprobs(6).requires_grad_(), random_logprobs(6, seed=1)
    winners, losers = torch.tensor([0, 3, 0, 5]), torch.tensor([1, 2, 5, 4])
    losses, rewards = dpo_by_index(pi, ref, winners, losers, 0.3)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    place = order.argsort()
    again, rewards_again = dpo_by_index(pi[order], ref[order], place[winners], place[losers], 0.3)
    assert torch.equal(again, losses)
    assert torch.equal(rewards_again, rewards[order])
    parts = [dpo_by_index(pi, ref, winners[rows], losers[rows], 0.3)[0] for rows in torch.arange(4).split(3)]
    assert torch.equal(torch.cat(parts), losses)


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
def test_divergence_rewards_are_made_one_by_one(divergence: Divergence, alpha: float) -> None:
    log_ratios = 3 * random_normal(6)
    flat = divergence_rewards(log_ratios, divergence, alpha=alpha)
    assert torch.equal(divergence_rewards(log_ratios.view(2, 3), divergence, alpha=alpha), flat.view(2, 3))
    assert torch.equal(divergence_rewards(log_ratios[4], divergence, alpha=alpha), flat[4])


def test_weights_and_desensitized_logprobs_are_made_row_by_row() -> None:
    logprobs, collisions = random_logprobs(3, 4), random_logprobs(3, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    shared = torch.tensor([2, 2, 1])
    weights = wpo_weights(logprobs, mask, collisions)
    sums = length_desensitized_logprobs(logprobs, mask, shared, alpha=0.3)
    for row in range(3):
        torch.testing.assert_close(wpo_weights(logprobs[row], mask[row], collisions[row]), weights[row])
        alone = length_desensitized_logprobs(logprobs[row], mask[row], shared[row], alpha=0.3)
        torch.testing.assert_close(alone, sums[row])


def test_padding_changes_neither_weights_nor_desensitized_logprobs() -> None:
    logprobs, collisions = random_logprobs(2, 3), random_logprobs(2, 3, seed=1)
    mask, shared = torch.ones(2, 3, dtype=torch.bool), torch.tensor([2, 3])
    padded = [torch.cat([x, torch.full((2, 2), math.nan, dtype=torch.float64)], 1) for x in (logprobs, collisions)]
    padded_mask = torch.cat([mask, ~mask[:, :2]], 1)
    assert torch.equal(wpo_weights(padded[0], padded_mask, padded[1]), wpo_weights(logprobs, mask, collisions))
    assert torch.equal(
        length_desensitized_logprobs(padded[0], padded_mask, shared, alpha=0.3),
        length_desensitized_logprobs(logprobs, mask, shared, alpha=0.3),
    )


# --- numbers that overflow, lists with holes, mistakes ---------------------------------------------------------------


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_extreme_log_ratios_stay_finite(name: str, gap: float) -> None:
    pair = torch.full((4,), gap, requires_grad=True), torch.full((4,), -gap, requires_grad=True)
    losses = PAIR_LOSSES[name](*pair)
    gradients = torch.autograd.grad(losses.sum(), pair)
    assert losses.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
def test_extreme_log_ratios_stay_finite_under_every_divergence(
    divergence: Divergence, alpha: float, gap: float
) -> None:
    log_ratios = torch.tensor([gap, -gap], requires_grad=True)
    loss = dpo(*divergence_rewards(log_ratios, divergence, alpha=alpha), beta=0.1)
    (gradient,) = torch.autograd.grad(loss, log_ratios)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gap > 0 or gradient[0] < 0  # a pair that is far off is still pulled back


def test_extreme_scores_lose_no_digits() -> None:
    """In float32 a lead of 1 between scores of 1e4 is still a lead of 1, and a hopeless lead is exactly linear."""
    expected = -math.log1p(math.exp(-1))
    for offset in (1e4, -1e4):
        scores = torch.tensor([offset + 1, offset])
        assert bradley_terry_logprob(scores[0], scores[1]).item() == pytest.approx(expected, rel=1e-6)
        assert plackett_luce_logprob(scores).item() == pytest.approx(expected, rel=1e-6)
    assert plackett_luce_logprob(torch.tensor([-1e4, 0.0, 1e4])).item() == -2e4 - 1e4
    assert plackett_luce_logprob(torch.tensor([1e4, 0.0, -1e4])).item() == 0


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


ONE = torch.ones(1)
YES = torch.ones(1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("beta must be positive", lambda: dpo(ONE, ONE, beta=0.0)),
        ("beta must be positive", lambda: dpo_by_index(ONE, ONE, torch.tensor([0]), torch.tensor([0]), -1.0)),
        ("beta must be positive", lambda: ipo(ONE, ONE, beta=math.nan)),
        ("beta must be positive", lambda: hinge(ONE, ONE, beta=-1.0)),
        ("beta must be positive", lambda: exo(ONE, ONE, beta=0.0, label_smoothing=0.1)),
        ("beta must be positive", lambda: discopop(ONE, ONE, beta=0.0)),
        ("beta must be positive", lambda: apo_down(ONE, ONE, beta=0.0)),
        ("beta must be positive", lambda: aot(ONE, ONE, beta=0.0)),
        (
            "beta must be positive",
            lambda: aot_unpaired(ONE, ONE, chosen_matched=ONE, rejected_matched=ONE, beta=0.0),
        ),
        ("beta must be positive", lambda: implicit_rewards(ONE, ONE, 0.0)),
        ("label_smoothing must lie", lambda: robust_dpo(ONE, ONE, beta=1.0, label_smoothing=0.5)),
        ("label_smoothing must lie", lambda: conservative_dpo(ONE, ONE, beta=1.0, label_smoothing=-0.1)),
        ("label_smoothing must lie", lambda: aot(ONE, ONE, beta=1.0, label_smoothing=0.5)),
        (r"label_smoothing must lie in \(0", lambda: exo(ONE, ONE, beta=1.0, label_smoothing=0.0)),
        (r"label_smoothing must lie in \(0", lambda: exo(ONE, ONE, beta=1.0, label_smoothing=0.5)),
        ("tau must lie", lambda: discopop(ONE, ONE, beta=1.0, tau=0.0)),
        ("tau must lie", lambda: discopop(ONE, ONE, beta=1.0, tau=1.1)),
        ("alpha must lie", lambda: divergence_rewards(ONE, "alpha", alpha=0.0)),
        ("alpha must lie", lambda: divergence_rewards(ONE, "alpha", alpha=1.0)),
        ("alpha must lie", lambda: length_desensitized_logprobs(ONE, YES, torch.tensor(1), alpha=1.1)),
        ("alpha must lie", lambda: length_desensitized_logprobs(ONE, YES, torch.tensor(1), alpha=-0.1)),
        ("alpha must not be", lambda: rpo(ONE, ONE, ONE, beta=1.0, alpha=-1.0)),
        ("centering_coef must not be", lambda: reward_model_loss(torch.ones(1, 2), centering_coef=-1.0)),
        ("at least one entry", lambda: plackett_luce_logprob(torch.ones(3, 0))),
    ],
)
def test_settings_out_of_range_are_named(message: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def unchecked(function: Any) -> Callable[..., Any]:
    """As it is outside of tests: without the run-time check of types and shapes."""
    return function.__wrapped__


def test_an_unknown_divergence_is_named() -> None:
    with pytest.raises(ValueError, match="got 'hellinger'"):
        unchecked(divergence_rewards)(ONE, "hellinger")


TWO, THREE, TABLE = torch.ones(2), torch.ones(3), torch.ones(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
PAIR = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("score_loser", lambda: unchecked(bradley_terry_logprob)(TWO, TABLE.T)),
        ("mask", lambda: unchecked(plackett_luce_logprob)(TABLE, MASK[:1])),
        ("margin", lambda: unchecked(reward_model_loss)(TABLE, margin=ONE)),
        ("ref_logprobs", lambda: unchecked(implicit_rewards)(TWO, ONE, 1.0)),
        ("ref_logps", lambda: unchecked(dpo_by_index)(TWO, ONE, PAIR, PAIR, 1.0)),
        *(
            ("rejected_log_ratios", partial(unchecked(loss), TWO, ONE, beta=1.0))
            for loss in (dpo, ipo, hinge, discopop)
        ),
        ("rejected_log_ratios", lambda: unchecked(apo_down)(TWO, ONE, beta=1.0)),
        *(
            ("rejected_log_ratios", partial(unchecked(loss), TWO, ONE, beta=1.0, label_smoothing=0.1))
            for loss in (conservative_dpo, robust_dpo, exo)
        ),
        ("chosen_mean_logprobs", lambda: unchecked(rpo)(TWO, TWO, ONE, beta=1.0, alpha=1.0)),
        ("targets", lambda: unchecked(match_ranks)(TWO, THREE)),
        (
            "rejected_log_ratios",
            lambda: unchecked(aot_unpaired)(TWO, ONE, chosen_matched=TWO, rejected_matched=ONE, beta=1.0),
        ),
        ("mask", lambda: unchecked(wpo_weights)(TABLE, MASK[:1], TABLE)),
        ("log_collision", lambda: unchecked(wpo_weights)(TABLE, MASK, TABLE[:1])),
        ("shared_lengths", lambda: unchecked(length_desensitized_logprobs)(TABLE, MASK, PAIR[:1], alpha=0.5)),
    ],
)
def test_shapes_that_differ_are_named(argument: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=f"{argument} has the shape"):
        call()
