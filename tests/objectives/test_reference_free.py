"""Losses without a reference: goldens, gradients, identities, and the exact minimisers of their population losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from trueup.objectives.optimum import kl_regularized_optimum
from trueup.objectives.preference import conservative_dpo, dpo
from trueup.objectives.reference_free import cpo, odds_ratio_loss, orpo, simpo

PairLoss = Callable[[Tensor, Tensor], Tensor]

LENGTHS = {"chosen_lengths": torch.tensor([3, 7, 2, 9]), "rejected_lengths": torch.tensor([4, 4, 11, 1])}
CHOSEN_LENGTHS = LENGTHS["chosen_lengths"]
LOSSES: dict[str, PairLoss] = {
    "simpo": partial(simpo, beta=2.0, margin=0.5, **LENGTHS),
    "odds ratio": partial(odds_ratio_loss, **LENGTHS),
    "orpo": partial(orpo, coef=0.4, **LENGTHS),
    "cpo": partial(cpo, beta=0.7, nll_coef=1.3, label_smoothing=0.1, chosen_lengths=CHOSEN_LENGTHS),
}


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random_logprobs(*shape: int, seed: int = 0) -> Tensor:
    return -10 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 0.5


# --- goldens, gradients --------------------------------------------------------------------------------------------


def test_goldens() -> None:
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
    # mean log-probs −1 and −2; β·1 − γ = log 3
    lead = simpo(t(-2), t(-8), beta=2 * math.log(3), margin=math.log(3), **lengths)
    assert lead.item() == pytest.approx(-math.log(3 / 4))
    # geometric means 3/4 and 1/2: odds 3 and 1
    pair = t(2 * math.log(3 / 4)), t(4 * math.log(1 / 2))
    assert odds_ratio_loss(*pair, **lengths).item() == pytest.approx(-math.log(3 / 4))
    assert orpo(*pair, coef=0.5, **lengths).item() == pytest.approx(-1.5 * math.log(3 / 4))
    # β·(−2 + 8) = log 3, and 1 nat a token
    plain = cpo(t(-2), t(-8), beta=math.log(3) / 6, chosen_lengths=torch.tensor([2]))
    assert plain.item() == pytest.approx(-math.log(3 / 4) + 1)
    smoothed = cpo(
        t(-2), t(-8), beta=math.log(3) / 6, chosen_lengths=torch.tensor([2]), label_smoothing=0.25, nll_coef=2.0
    )
    assert smoothed.item() == pytest.approx(-0.75 * math.log(3 / 4) - 0.25 * math.log(1 / 4) + 2)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    arguments = [random_logprobs(4, seed=i).requires_grad_() for i in range(2)]
    assert torch.autograd.gradcheck(LOSSES[name], arguments)


# --- identities --------------------------------------------------------------------------------------------------


def test_simpo_without_margin_is_dpo_per_token() -> None:
    chosen, rejected = random_logprobs(4), random_logprobs(4, seed=1)
    per_token = chosen / LENGTHS["chosen_lengths"], rejected / LENGTHS["rejected_lengths"]
    assert torch.equal(simpo(chosen, rejected, beta=2.0, margin=0.0, **LENGTHS), dpo(*per_token, beta=2.0))


def test_cpo_without_likelihood_is_dpo_under_a_reference_that_likes_all_alike() -> None:
    chosen, rejected = random_logprobs(4), random_logprobs(4, seed=1)
    ours = partial(cpo, chosen, rejected, chosen_lengths=CHOSEN_LENGTHS, beta=0.3, nll_coef=0.0)
    assert torch.equal(ours(), dpo(chosen, rejected, beta=0.3))
    assert torch.equal(ours(label_smoothing=0.2), conservative_dpo(chosen, rejected, beta=0.3, label_smoothing=0.2))


def test_a_coefficient_of_zero_leaves_the_likelihood() -> None:
    chosen, rejected = random_logprobs(4), random_logprobs(4, seed=1)
    assert torch.equal(orpo(chosen, rejected, coef=0.0, **LENGTHS), -chosen / CHOSEN_LENGTHS)


# --- expectations: exact population losses ---------------------------------------------------------------------------

TOKENS = torch.tensor([1, 3, 2, 5, 4])
"""Lengths of the five responses."""


def test_cpo_ends_at_the_optimum_of_a_uniform_reference(preferences: Any, newton: Any) -> None:
    problem, beta = preferences(3), 0.7

    def population(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        return problem.loss(
            lambda w, r: cpo(logprobs[w], logprobs[r], beta=beta, nll_coef=0.0, chosen_lengths=TOKENS[w])
        )

    uniform = torch.full((5,), -math.log(5), dtype=torch.float64)
    optimum, _ = kl_regularized_optimum(uniform, problem.rewards, beta)
    torch.testing.assert_close(newton(population, uniform).log_softmax(-1), optimum, rtol=0, atol=1e-9)


def log_odds(mean_logprobs: Tensor) -> Tensor:
    return mean_logprobs - torch.log1p(-mean_logprobs.exp())


@pytest.mark.parametrize(
    ("loss", "reward"),
    [
        (partial(simpo, beta=2.0, margin=0.0), lambda mean_logprobs: 2.0 * mean_logprobs),
        (odds_ratio_loss, log_odds),
    ],
)
def test_population_minimisers_have_the_true_rewards_per_token(
    preferences: Any, newton: Any, loss: Callable[..., Tensor], reward: Callable[[Tensor], Tensor]
) -> None:
    """Up to a constant, what each loss takes for a reward is that of the labels: β·log π/|y|, and the log-odds."""
    problem = preferences(5)

    def population(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        return problem.loss(
            lambda w, r: loss(logprobs[w], logprobs[r], chosen_lengths=TOKENS[w], rejected_lengths=TOKENS[r])
        )

    recovered = reward(newton(population, problem.ref).log_softmax(-1) / TOKENS)
    truth = problem.rewards - problem.rewards.mean()
    torch.testing.assert_close(recovered - recovered.mean(), truth, rtol=0, atol=1e-9)


def drawn_from(policy: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs, how often each occurs with the first of them chosen: labels of Bradley and Terry with these rewards,
    and pairs in such shares that a chosen response is a draw from the policy."""
    first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).unbind(-1)
    first, second = first[first != second], second[first != second]
    # σ(r_i − r_j) = g_i/(g_i + g_j) with g = e^r. A share of (g_i + g_j)·(a_i + a_j) makes Σ_j g_i·(a_i + a_j) = π_i.
    wanted = policy / rewards.exp()
    a = (wanted - wanted.sum() / 8) / 3
    share = (rewards[first].exp() + rewards[second].exp()) * (a[first] + a[second])
    assert (share > 0).all()
    chosen = share * torch.sigmoid(rewards[first] - rewards[second])
    assert torch.zeros(5, dtype=torch.float64).index_add(0, first, chosen).tolist() == pytest.approx(policy.tolist())
    return first, second, chosen


ONE_TOKEN = {"chosen_lengths": torch.ones(20), "rejected_lengths": torch.ones(20)}


@pytest.mark.parametrize("coef", [0.1, 2.0])
@pytest.mark.parametrize("kind", ["orpo", "cpo"])
def test_likelihood_and_comparison_end_together_where_both_are_best(newton: Any, kind: str, coef: float) -> None:
    """Responses of one token, chosen as often as π has them, by labels whose rewards are what the loss takes for those
    of π: its log-odds (ORPO), or β·log π (CPO). Each term alone is at its best at π, so their sum is, for all weights.
    """
    policy, beta = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64), 0.7
    rewards = log_odds(policy.log()) if kind == "orpo" else beta * policy.log()
    first, second, frequency = drawn_from(policy, rewards)

    def population(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        pair = logprobs[first], logprobs[second]
        if kind == "orpo":
            losses = orpo(*pair, coef=coef, **ONE_TOKEN)
        else:
            losses = cpo(*pair, beta=beta, nll_coef=coef, chosen_lengths=ONE_TOKEN["chosen_lengths"])
        return (frequency * losses).sum()

    ended = newton(population, t(0, 0, 0, 0, 0)).softmax(-1)
    torch.testing.assert_close(ended, policy, rtol=0, atol=1e-9)


# --- invariance, numbers that overflow, mistakes ---------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_each_pair_is_judged_alone(name: str) -> None:
    chosen, rejected = random_logprobs(4), random_logprobs(4, seed=1)
    keywords = dict(LOSSES[name].keywords)  # pyright: ignore[reportFunctionMemberAccess]
    together = LOSSES[name](chosen, rejected)
    for i in range(4):
        own = {key: value[i] if isinstance(value, Tensor) else value for key, value in keywords.items()}
        alone = LOSSES[name].func(chosen[i], rejected[i], **own)  # pyright: ignore[reportFunctionMemberAccess]
        torch.testing.assert_close(alone, together[i], rtol=1e-14, atol=0)


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logprobs_stay_finite(name: str, gap: float) -> None:
    chosen = torch.full((4,), -3e4 + gap, requires_grad=True)
    rejected = torch.full((4,), -3e4 - gap, requires_grad=True)
    losses = LOSSES[name](chosen, rejected)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert losses.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


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
    assert odds_ratio_loss(t(-1e-9, -50), even, **one).tolist() == pytest.approx([1e-9, 50], rel=1e-13, abs=0)


ONE = torch.ones(1)
BOTH = {"chosen_lengths": ONE, "rejected_lengths": ONE}
LONGER = {"rejected_lengths": torch.ones(2)}


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("beta must be positive", lambda: simpo(ONE, ONE, beta=0.0, margin=1.0, **BOTH)),
        ("margin must not be", lambda: simpo(ONE, ONE, beta=1.0, margin=-1.0, **BOTH)),
        ("coef must not be", lambda: orpo(ONE, ONE, coef=-1.0, **BOTH)),
        ("beta must be positive", lambda: cpo(ONE, ONE, beta=0.0, chosen_lengths=ONE)),
        ("label_smoothing must lie", lambda: cpo(ONE, ONE, beta=1.0, label_smoothing=0.5, chosen_lengths=ONE)),
        ("nll_coef must not be", lambda: cpo(ONE, ONE, beta=1.0, nll_coef=-1.0, chosen_lengths=ONE)),
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
        ("chosen_lengths", lambda: unchecked(cpo)(ONE, ONE, beta=1.0, chosen_lengths=torch.ones(2))),
        ("rejected_lengths", lambda: unchecked(simpo)(ONE, ONE, beta=1.0, margin=0.0, **(BOTH | LONGER))),
        ("rejected_lengths", lambda: unchecked(odds_ratio_loss)(ONE, ONE, **(BOTH | LONGER))),
    ],
)
def test_shapes_that_differ_are_named(argument: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=f"{argument} has the shape"):
        call()
