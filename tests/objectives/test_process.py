"""The process reward loss climbs the ladder: by hand, identities, the expectation over all solutions, invariance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from trueup.objectives.preference import bradley_terry_logprob
from trueup.objectives.process import (
    AGGREGATIONS,
    last_step_score,
    mean_step_score,
    min_step_score,
    process_reward_loss,
    product_step_score,
)


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_labels(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


SCORES = t(1.0, -2.0, 0.5, 3.0)
HALF = torch.tensor([True, True, False, False])


# --- rung 1: by hand, finite differences


def test_by_hand() -> None:
    """σ(log 3) = 3/4: a right step costs log 4/3, a wrong one log 4, a step that is right two times in three a mix."""
    losses = process_reward_loss(t(math.log(3)).expand(3), t(1.0, 0.0, 2 / 3))
    right, wrong = math.log(4 / 3), math.log(4)
    torch.testing.assert_close(losses, t(right, wrong, 2 / 3 * right + 1 / 3 * wrong), rtol=0, atol=1e-15)


def test_far_from_zero_nothing_overflows() -> None:
    losses = process_reward_loss(t(1e4, -1e4, 1e4, -1e4), t(1.0, 0.0, 0.0, 1.0))
    assert losses.tolist() == [0.0, 0.0, 1e4, 1e4]


def test_gradient_is_the_probability_minus_the_label() -> None:
    """∂L/∂s = σ(s) − z; and it is what finite differences say."""
    scores, labels = random_scores(3, 5).requires_grad_(), random_labels(3, 5)
    (gradient,) = torch.autograd.grad(process_reward_loss(scores, labels).sum(), scores)
    torch.testing.assert_close(gradient, scores.detach().sigmoid() - labels, rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(lambda s: process_reward_loss(s, labels), (scores,))


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregations_have_the_gradient_of_finite_differences(name: str) -> None:
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    scores = random_scores(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: AGGREGATIONS[name](s, mask), (scores,))


def test_aggregations_by_hand() -> None:
    assert [float(AGGREGATIONS[name](SCORES)) for name in ("last", "min", "mean")] == [3.0, -2.0, 0.625]
    probabilities = [1 / (1 + math.exp(-s)) for s in SCORES.tolist()]
    assert float(product_step_score(SCORES)) == pytest.approx(math.log(math.prod(probabilities)), abs=1e-15)
    masked = [float(AGGREGATIONS[name](SCORES, HALF)) for name in ("last", "min", "mean", "product")]
    log_product = float(logsigmoid(SCORES)[:2].sum())
    assert masked == pytest.approx([-2.0, -2.0, -0.5, log_product], abs=1e-15)


def test_a_gap_of_unlabelled_steps_is_passed_over() -> None:
    mask = torch.tensor([False, True, False, True])
    assert float(last_step_score(SCORES, mask)) == 3.0
    assert float(last_step_score(SCORES, ~mask)) == 0.5
    assert float(mean_step_score(SCORES, ~mask)) == 0.75


def test_a_row_without_steps() -> None:
    nothing = torch.zeros(4, dtype=torch.bool)
    assert last_step_score(SCORES, nothing).isnan()
    assert mean_step_score(SCORES, nothing).isnan()
    assert float(min_step_score(SCORES, nothing)) == math.inf
    assert float(product_step_score(SCORES, nothing)) == 0.0
    assert process_reward_loss(SCORES, SCORES, nothing).tolist() == [0.0] * 4


# --- rung 2: identities


def test_a_hard_label_is_a_comparison_with_zero() -> None:
    """−log σ(s): the step wins against a completion with the score 0, as Bradley and Terry have it."""
    zero = torch.zeros_like(SCORES)
    ones = process_reward_loss(SCORES, torch.ones_like(SCORES))
    assert torch.equal(ones, -bradley_terry_logprob(SCORES, zero))
    zeros = process_reward_loss(SCORES, zero)
    torch.testing.assert_close(zeros - ones, SCORES, rtol=0, atol=1e-14)  # log-odds


def test_a_soft_label_is_the_mean_over_hard_ones() -> None:
    votes = t(1.0, 1.0, 0.0, 1.0)
    hard = process_reward_loss(SCORES[:, None].expand(4, 4), votes.expand(4, 4)).mean(-1)
    torch.testing.assert_close(process_reward_loss(SCORES, votes.mean().expand(4)), hard, rtol=0, atol=1e-14)


def test_it_is_pytorch_s_binary_cross_entropy() -> None:
    scores, labels = random_scores(4, 7), random_labels(4, 7)
    expected = binary_cross_entropy_with_logits(scores, labels, reduction="none")
    torch.testing.assert_close(process_reward_loss(scores, labels), expected, rtol=0, atol=1e-14)


def test_of_one_step_all_aggregations_are_that_step() -> None:
    score = t(0.7)[:, None]
    assert all(float(AGGREGATIONS[name](score)) == 0.7 for name in ("last", "min", "mean"))
    assert torch.equal(product_step_score(score), logsigmoid(t(0.7)))


def test_the_worst_step_bounds_the_product() -> None:
    """A product of probabilities lies below its smallest factor, and above that factor to the number of steps."""
    scores = random_scores(50, 6)
    product, worst = product_step_score(scores), logsigmoid(min_step_score(scores))
    assert (product <= worst).all()
    assert (product >= 6 * worst).all()


# --- rung 3: the expectation over all labelled solutions of an enumerable problem

STEPS, LENGTH = 3, 3
CHANCE = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
"""How probable it is that a step of each kind is judged right, where the ones before it were right."""


def solutions() -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Every solution of three steps of three kinds with every judgement of it, and its probability.

    A step behind a wrong one is right with half its chance, so that the truth depends on what came before, and is what
    is left when the earlier judgements are summed out.
    """
    found = []
    for kinds in itertools.product(range(STEPS), repeat=LENGTH):
        for judged in itertools.product((0, 1), repeat=LENGTH):
            probability = STEPS**-LENGTH
            for place, (kind, right) in enumerate(zip(kinds, judged, strict=True)):
                chance = float(CHANCE[kind]) * (1.0 if all(judged[:place]) else 0.5)
                probability *= chance if right else 1 - chance
            found.append((kinds, judged, probability))
    assert sum(p for *_, p in found) == pytest.approx(1, abs=1e-12)
    return found


def test_the_population_minimiser_is_the_probability_of_right() -> None:
    """One free score per (steps up to t): where the mean loss is flat, σ(s) is the enumerated probability of right."""
    prefixes = {p: i for i, p in enumerate(p for n in (1, 2, 3) for p in itertools.product(range(STEPS), repeat=n))}
    right, seen = torch.zeros(len(prefixes), dtype=torch.float64), torch.zeros(len(prefixes), dtype=torch.float64)
    for kinds, judged, probability in solutions():
        for place in range(LENGTH):
            index = prefixes[kinds[: place + 1]]
            right[index] += probability * judged[place]
            seen[index] += probability
    truth = right / seen

    def mean_loss(free: Tensor) -> Tensor:
        index = torch.tensor([[prefixes[kinds[: n + 1]] for n in range(LENGTH)] for kinds, *_ in solutions()])
        labels = torch.tensor([judged for _, judged, _ in solutions()], dtype=torch.float64)
        weights = torch.tensor([p for *_, p in solutions()], dtype=torch.float64)
        return (process_reward_loss(free[index], labels).sum(-1) * weights).sum()

    at_truth = truth.logit()
    gradient = torch.autograd.functional.jacobian(mean_loss, at_truth)
    assert float(gradient.abs().max()) < 1e-15
    # Convex, and strictly: it is the only minimum.
    curvature = torch.autograd.functional.hessian(mean_loss, at_truth).diagonal()
    torch.testing.assert_close(curvature, seen * truth * (1 - truth), rtol=0, atol=1e-15)
    # Soft labels have the same minimiser: the mean judgement in place of the judgements.
    soft = process_reward_loss(at_truth, truth)
    (flat,) = torch.autograd.grad(process_reward_loss(at_truth.requires_grad_(), truth).sum(), at_truth)
    assert float(flat.abs().max()) < 1e-15
    assert (soft > 0).all()


# --- rung 4: invariance


def test_what_is_masked_can_t_leak() -> None:
    dirty = torch.stack([SCORES, t(1.0, -2.0, math.nan, math.inf)])
    labels = torch.stack([t(1.0, 0.0, 1.0, 0.5), t(1.0, 0.0, math.nan, math.nan)])
    mask = torch.stack([torch.ones(4, dtype=torch.bool), HALF])
    scores = dirty.clone().requires_grad_()
    losses = process_reward_loss(scores, labels, mask)
    assert torch.equal(losses[1, :2], losses[0, :2])
    assert losses[1, 2:].tolist() == [0.0, 0.0]
    total = losses.sum() + sum(aggregate(scores, mask).sum() for aggregate in AGGREGATIONS.values())
    (gradient,) = torch.autograd.grad(total, scores)
    assert gradient.isfinite().all()
    assert gradient[1, 2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_padding_changes_nothing(name: str) -> None:
    scores = random_scores(3, 4)
    padded = torch.cat([scores, random_scores(3, 2, seed=1)], dim=1)
    mask = torch.arange(6).expand(3, 6) < 4
    torch.testing.assert_close(AGGREGATIONS[name](padded, mask), AGGREGATIONS[name](scores), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_row_without_steps_leaves_the_others_alone(name: str) -> None:
    scores, mask = random_scores(3, 4), torch.arange(4) < torch.tensor([[4], [0], [2]])
    alone = torch.stack([AGGREGATIONS[name](*row) for row in zip(scores, mask, strict=True)])
    torch.testing.assert_close(AGGREGATIONS[name](scores, mask), alone, rtol=0, atol=1e-15, equal_nan=True)


def test_steps_and_rows_are_judged_one_by_one() -> None:
    scores, labels = random_scores(4, 3), random_labels(4, 3)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(process_reward_loss(scores[order], labels[order]), process_reward_loss(scores, labels)[order])
    flat = process_reward_loss(scores.flatten(), labels.flatten())
    assert torch.equal(flat.view(4, 3), process_reward_loss(scores, labels))


@pytest.mark.parametrize("call", [*AGGREGATIONS.values(), lambda s, m: process_reward_loss(s, s, m)])
def test_shapes_that_differ_are_refused(call) -> None:
    mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(TypeCheckError):
        call(random_scores(2, 4), mask)
