"""Pointwise losses: goldens, gradients, identities, and the exact minimisers of their population losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from trueup.objectives.divergence import categorical_kl
from trueup.objectives.optimum import kl_regularized_optimum
from trueup.objectives.pointwise import apo_zero, bco, bco_shift, kto, kto_kl, nca, sppo

PointwiseLoss = Callable[[Tensor, Tensor], Tensor]
Newton = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def scalar(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def random_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hard_sppo(log_ratios: Tensor, desirable: Tensor, *, beta: float) -> Tensor:
    return sppo(log_ratios, desirable.to(log_ratios.dtype), beta=beta)


LOSSES: dict[str, PointwiseLoss] = {
    "kto": partial(kto, kl=scalar(0.4), beta=0.7, desirable_weight=1.5, undesirable_weight=0.8),
    "bco": partial(bco, beta=0.7, shift=scalar(-0.3)),
    "apo_zero": partial(apo_zero, beta=0.7),
    "nca": partial(nca, beta=0.7),
    "sppo": partial(hard_sppo, beta=0.7),
}
LABELS = torch.tensor([True, False, True, False, False, True])
UP, DOWN = torch.tensor([True]), torch.tensor([False])


# --- goldens -----------------------------------------------------------------------------------------------------


def test_kto_golden() -> None:
    # β·(u − z₀) = log 3 and σ = 3/4
    options = {"kl": scalar(0.5), "beta": math.log(3), "desirable_weight": 2.0, "undesirable_weight": 3.0}
    assert kto(t(1.5), UP, **options).item() == pytest.approx(2 / 4, rel=1e-15)
    assert kto(t(1.5), DOWN, **options).item() == pytest.approx(3 * 3 / 4, rel=1e-15)
    assert kto(t(1.5), UP, kl=scalar(0.5), beta=math.log(3)).item() == pytest.approx(1 / 4, rel=1e-15)
    assert kto(t(1.5), DOWN, kl=scalar(0.5), beta=math.log(3)).item() == pytest.approx(3 / 4, rel=1e-15)


def test_kto_kl_golden() -> None:
    assert kto_kl(t(1, 2, 0)).item() == 1
    assert kto_kl(t(1, -2)).item() == 0


def test_bco_golden() -> None:
    # β·u − δ = log 3
    beta, shift = 2.0, scalar(1.0 - math.log(3))
    assert bco(t(0.5), UP, beta=beta, shift=shift).item() == pytest.approx(-math.log(3 / 4), rel=1e-15)
    assert bco(t(0.5), DOWN, beta=beta, shift=shift).item() == pytest.approx(-math.log(1 / 4), rel=1e-15)
    # rewards 2 and 4 against −6: half-way between 3 and −6
    assert bco_shift(t(1, -3, 2), torch.tensor([True, False, True]), beta=2.0).item() == -1.5
    # where one of the kinds is missing, the other's mean
    assert bco_shift(t(1, 2), UP.expand(2), beta=2.0).item() == 3
    assert bco_shift(t(-3, -4), DOWN.expand(2), beta=2.0).item() == -7


def test_apo_zero_golden() -> None:
    assert apo_zero(t(1), UP, beta=math.log(3)).item() == pytest.approx(1 / 4, rel=1e-15)
    assert apo_zero(t(1), DOWN, beta=math.log(3)).item() == pytest.approx(3 / 4, rel=1e-15)


def test_nca_golden() -> None:
    noise = -0.5 * math.log(1 / 4)
    assert nca(t(1), UP, beta=math.log(3)).item() == pytest.approx(noise - math.log(3 / 4), rel=1e-15)
    assert nca(t(1), DOWN, beta=math.log(3)).item() == pytest.approx(noise, rel=1e-15)


def test_sppo_golden() -> None:
    # the targets are (P − ½)/β: 2, −2, 1 and 0
    assert sppo(t(1, 1, 1, 1), t(1, 0, 0.75, 0.5), beta=0.25).tolist() == [1, 9, 0, 1]


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    log_ratios = (2 * random_normal(6)).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: LOSSES[name](u, LABELS), log_ratios)


def test_gradient_of_soft_sppo() -> None:
    win_probability = random_normal(6, seed=1).sigmoid()
    assert torch.autograd.gradcheck(lambda u: sppo(u, win_probability, beta=0.7), random_normal(6).requires_grad_())


def test_statistics_of_the_batch_take_no_gradient() -> None:
    log_ratios = random_normal(6).requires_grad_()
    assert not kto_kl(log_ratios).requires_grad
    assert not bco_shift(log_ratios, LABELS, beta=0.5).requires_grad
    kl, shift = scalar(0.3).requires_grad_(), scalar(0.3).requires_grad_()
    total = kto(log_ratios, LABELS, kl=kl, beta=0.5) + bco(log_ratios, LABELS, beta=0.5, shift=shift)
    assert torch.autograd.grad(total.sum(), (kl, shift), allow_unused=True) == (None, None)


@pytest.mark.parametrize("name", LOSSES)
def test_desirable_goes_up_and_undesirable_down_from_the_reference(name: str) -> None:
    at_reference = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(LOSSES[name](at_reference, LABELS).sum(), at_reference)
    assert torch.equal(gradient < 0, LABELS)
    assert gradient.ne(0).all()


# --- identities --------------------------------------------------------------------------------------------------


def test_kto_without_reference_point_is_apo_zero() -> None:
    log_ratios = random_normal(6)
    assert torch.equal(kto(log_ratios, LABELS, kl=scalar(0), beta=0.3), apo_zero(log_ratios, LABELS, beta=0.3))


@pytest.mark.parametrize(
    "loss", [partial(apo_zero, beta=0.7), partial(bco, beta=0.7, shift=scalar(0)), partial(hard_sppo, beta=0.7)]
)
def test_a_label_turned_is_a_log_ratio_turned(loss: PointwiseLoss) -> None:
    log_ratios = random_normal(6)
    torch.testing.assert_close(loss(log_ratios, LABELS), loss(-log_ratios, ~LABELS), rtol=1e-14, atol=0)


def test_bco_moves_its_reference_by_the_shift() -> None:
    log_ratios, shift = random_normal(6), scalar(0.8)
    shifted = bco(log_ratios - shift / 0.5, LABELS, beta=0.5, shift=scalar(0))
    torch.testing.assert_close(bco(log_ratios, LABELS, beta=0.5, shift=shift), shifted, rtol=1e-14, atol=0)


def test_what_nca_adds_for_a_desirable_completion_is_bco() -> None:
    log_ratios = random_normal(6)
    everything, nothing = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    torch.testing.assert_close(
        nca(log_ratios, everything, beta=0.7) - nca(log_ratios, nothing, beta=0.7),
        bco(log_ratios, everything, beta=0.7, shift=scalar(0)),
        rtol=1e-13,
        atol=0,
    )


def test_reference_point_of_samples_of_the_policy_is_its_divergence() -> None:
    """Four samples that occur as often as π has them, so that their mean is the expectation."""
    policy, ref = t(2, 1, 1).div(4).log(), t(1, 1, 2).div(4).log()
    samples = torch.tensor([0, 0, 1, 2])
    expected = categorical_kl(policy, ref).item()
    assert expected == pytest.approx(math.log(2) / 4)
    assert kto_kl((policy - ref)[samples]).item() == pytest.approx(expected, rel=1e-14)


# --- expectations: every label with its probability -----------------------------------------------------------------


def expected_loss(loss: PointwiseLoss, log_ratios: Tensor, desirable_probability: Tensor) -> Tensor:
    """The loss of each response in the mean over its label."""
    good = torch.ones_like(log_ratios, dtype=torch.bool)
    return desirable_probability * loss(log_ratios, good) + (1 - desirable_probability) * loss(log_ratios, ~good)


def test_kto_decides_by_weighted_majority() -> None:
    """Its expected gradient is β·σ'·(λ_U·(1 − p) − λ_D·p), of one sign for all log-ratios."""
    beta, kl, weights = 0.6, scalar(0.2), {"desirable_weight": 1.5, "undesirable_weight": 1.0}
    threshold = 1.0 / (1.0 + 1.5)  # where λ_D·p = λ_U·(1 − p)
    probability = t(0.1, threshold, 0.9).expand(7, 3)
    log_ratios = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None].expand(7, 3).clone().requires_grad_()
    loss = expected_loss(partial(kto, kl=kl, beta=beta, **weights), log_ratios, probability)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratios)
    slope = torch.sigmoid(beta * (log_ratios - kl)) * torch.sigmoid(-beta * (log_ratios - kl))
    torch.testing.assert_close(gradient, beta * slope * ((1 - probability) - 1.5 * probability), rtol=1e-12, atol=1e-16)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1].abs() < 1e-16).all()
    assert (gradient[:, 2] < 0).all()


def test_apo_zero_decides_by_majority() -> None:
    """Its expected gradient is β·σ'·(1 − 2p): up where good is likelier, down where bad is, never at an end."""
    beta, probability = 0.6, t(0.1, 0.5, 0.9).expand(7, 3)
    log_ratios = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None].expand(7, 3).clone().requires_grad_()
    loss = expected_loss(partial(apo_zero, beta=beta), log_ratios, probability)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratios)
    slope = torch.sigmoid(beta * log_ratios) * torch.sigmoid(-beta * log_ratios)
    torch.testing.assert_close(gradient, beta * slope * (1 - 2 * probability), rtol=1e-12, atol=1e-16)


def test_bco_ends_at_the_kl_regularised_optimum(newton: Newton) -> None:
    """Thumbs go up with probability σ(r + c). With the shift that normalises it, the policy is π* of r."""
    beta, rewards, ref = 0.7, random_normal(5, seed=3), random_normal(5, seed=4).log_softmax(-1)
    frequency, tendency = random_normal(5, seed=5).softmax(-1), 0.3
    optimum, log_partition = kl_regularized_optimum(ref, rewards, beta)
    probability = torch.sigmoid(rewards + tendency)

    def minimiser(shift: Tensor) -> Tensor:
        def population(logits: Tensor) -> Tensor:
            log_ratios = logits.log_softmax(-1) - ref
            return (frequency * expected_loss(partial(bco, beta=beta, shift=shift), log_ratios, probability)).sum()

        return newton(population, ref).log_softmax(-1)

    normalising = -beta * log_partition - tendency
    torch.testing.assert_close(minimiser(normalising), optimum, rtol=0, atol=1e-9)
    assert (minimiser(normalising + 1) - optimum).abs().max() > 0.05


def test_bco_recovers_the_log_odds_of_a_label(newton: Newton) -> None:
    beta, shift, probability = 0.7, scalar(0.4), t(0.05, 0.3, 0.5, 0.8, 0.99)
    log_ratios = newton(
        lambda u: expected_loss(partial(bco, beta=beta, shift=shift), u, probability).sum(), t(*[0] * 5)
    )
    torch.testing.assert_close(beta * log_ratios, shift + probability.logit(), rtol=0, atol=1e-10)


def win_probabilities() -> Tensor:
    """p(i ≻ j) of preferences that no scores explain: they run in a circle."""
    wins = torch.full((4, 4), 0.5, dtype=torch.float64)
    for better, worse, probability in ((0, 1, 0.9), (1, 2, 0.8), (2, 0, 0.7), (0, 3, 0.6), (3, 1, 0.55), (2, 3, 0.95)):
        wins[better, worse], wins[worse, better] = probability, 1 - probability
    return wins


def test_nca_ends_at_twice_the_probability_to_win(newton: Newton) -> None:
    """π* = 2·π_ref·p(y ≻ π_ref) for pairs drawn from π_ref: normalised without a partition function."""
    ref, wins = random_normal(4, seed=1).log_softmax(-1), win_probabilities()
    beats_ref = wins @ ref.exp()

    def population(logits: Tensor) -> Tensor:
        return (ref.exp() * expected_loss(partial(nca, beta=1.0), logits.log_softmax(-1) - ref, beats_ref)).sum()

    torch.testing.assert_close(
        newton(population, ref).log_softmax(-1), ref + torch.log(2 * beats_ref), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_nca_of_a_completion_that_wins_half_its_pairs_stays(newton: Newton, beta: float) -> None:
    probability = t(0.1, 0.5, 0.9)
    log_ratios = newton(lambda u: expected_loss(partial(nca, beta=beta), u, probability).sum(), t(0, 0, 0))
    torch.testing.assert_close(beta * log_ratios, torch.log(2 * probability), rtol=0, atol=1e-9)


def test_hard_labels_of_sppo_have_the_gradient_of_soft_ones() -> None:
    log_ratios, probability = random_normal(6).requires_grad_(), random_normal(6, seed=1).sigmoid()
    hard = expected_loss(partial(hard_sppo, beta=0.3), log_ratios, probability).sum()
    (expected,) = torch.autograd.grad(sppo(log_ratios, probability, beta=0.3).sum(), log_ratios)
    torch.testing.assert_close(torch.autograd.grad(hard, log_ratios)[0], expected, rtol=1e-12, atol=1e-12)


def test_sppo_ends_at_a_step_of_multiplicative_weights(newton: Newton) -> None:
    """Normalised, its log-ratios are π ∝ π_ref·exp(p(y ≻ π_ref)/β), which is also where IPO on that data ends."""
    beta, ref, wins = 0.7, random_normal(4, seed=1).log_softmax(-1), win_probabilities()
    beats_ref = wins @ ref.exp()
    log_ratios = newton(lambda u: expected_loss(partial(hard_sppo, beta=beta), u, beats_ref).sum(), t(0, 0, 0, 0))
    torch.testing.assert_close(
        (ref + log_ratios).log_softmax(-1), (ref + beats_ref / beta).log_softmax(-1), rtol=0, atol=1e-12
    )


# --- invariance --------------------------------------------------------------------------------------------------


def test_micro_batches_add_up_to_the_batch() -> None:
    """With the statistics of the whole batch passed in, gradients of parts are the gradient of the whole."""
    features, weights = random_normal(12, 3), random_normal(3, seed=1).requires_grad_()
    desirable = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0], dtype=torch.bool)
    kl = kto_kl((features.roll(1, 0) @ weights).abs())
    shift = bco_shift(features @ weights, desirable, beta=0.7)
    assert kl > 0

    def gradient(rows: Tensor, loss: PointwiseLoss) -> Tensor:
        total = loss(features[rows] @ weights, desirable[rows]).sum() / len(features)
        return torch.autograd.grad(total, weights)[0]

    for loss in (partial(kto, kl=kl, beta=0.7), partial(bco, beta=0.7, shift=shift)):
        parts = sum(gradient(rows, loss) for rows in torch.arange(12).split(5))
        torch.testing.assert_close(parts, gradient(torch.arange(12), loss), rtol=1e-13, atol=1e-15)


def test_statistics_of_the_batch_do_not_depend_on_its_order() -> None:
    log_ratios, order = random_normal(6).abs(), torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(kto_kl(log_ratios[order]), kto_kl(log_ratios), rtol=1e-15, atol=0)
    torch.testing.assert_close(kto_kl(log_ratios.view(2, 3)), kto_kl(log_ratios), rtol=1e-15, atol=0)
    shift = bco_shift(log_ratios, LABELS, beta=0.7)
    torch.testing.assert_close(bco_shift(log_ratios[order], LABELS[order], beta=0.7), shift, rtol=1e-14, atol=0)
    shaped = bco_shift(log_ratios.view(2, 3), LABELS.view(2, 3), beta=0.7)
    torch.testing.assert_close(shaped, shift, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_any_shape_one_loss_per_completion(name: str) -> None:
    log_ratios = random_normal(6)
    flat = LOSSES[name](log_ratios, LABELS)
    assert torch.equal(LOSSES[name](log_ratios.view(3, 2), LABELS.view(3, 2)), flat.view(3, 2))
    assert torch.equal(LOSSES[name](log_ratios[0], LABELS[0]), flat[0])


# --- numbers that overflow, mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios_stay_finite(name: str) -> None:
    log_ratios = torch.tensor([1e4, 1e4, -1e4, -1e4], requires_grad=True)
    losses = LOSSES[name](log_ratios, torch.tensor([True, False, True, False]))
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratios)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


NONE = scalar(0)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("beta must be positive", lambda: kto(t(1), UP, kl=NONE, beta=0.0)),
        ("desirable_weight must not", lambda: kto(t(1), UP, kl=NONE, beta=1.0, desirable_weight=-1.0)),
        ("undesirable_weight must not", lambda: kto(t(1), UP, kl=NONE, beta=1.0, undesirable_weight=math.nan)),
        ("beta must be positive", lambda: bco(t(1), UP, beta=-1.0, shift=NONE)),
        ("beta must be positive", lambda: bco_shift(t(1, 2), torch.tensor([True, False]), beta=0.0)),
        ("at least one completion", lambda: bco_shift(t(), UP[:0], beta=1.0)),
        ("beta must be positive", lambda: apo_zero(t(1), UP, beta=0.0)),
        ("beta must be positive", lambda: nca(t(1), UP, beta=0.0)),
        ("beta must be positive", lambda: sppo(t(1), t(1), beta=0.0)),
    ],
)
def test_settings_out_of_range_are_named(message: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def unchecked(function: Any) -> Callable[..., Tensor]:
    """As it is outside of tests: without the run-time check of types and shapes."""
    return function.__wrapped__


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("desirable", lambda: unchecked(bco)(t(1, 2), UP, beta=1.0, shift=NONE)),
        ("desirable", lambda: unchecked(bco_shift)(t(1, 2), UP, beta=1.0)),
        ("desirable", lambda: unchecked(apo_zero)(t(1, 2), UP, beta=1.0)),
        ("desirable", lambda: unchecked(nca)(t(1, 2), UP, beta=1.0)),
        ("win_probability", lambda: unchecked(sppo)(t(1, 2), t(1), beta=1.0)),
    ],
)
def test_shapes_that_differ_are_named(argument: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=f"{argument} has the shape"):
        call()
