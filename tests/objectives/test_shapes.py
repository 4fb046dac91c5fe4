"""What every objective checks on its own, where no run-time checker of annotations is installed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from trueup.objectives import (
    advantages,
    derivatives,
    divergence,
    logprobs,
    optimum,
    pointwise,
    preference,
    process,
    reduce,
    reference_free,
    returns,
    value,
)
from trueup.objectives import policy_gradient as pg
from trueup.objectives.reduce import token_mean
from trueup.objectives.shapes import fill_masked, require_same_shape


def test_require_same_shape_names_the_argument() -> None:
    x = torch.zeros(2, 3)
    require_same_shape(x, other=torch.ones(2, 3), absent=None)
    with pytest.raises(ValueError, match=r"values has the shape \(2,\), expected \(2, 3\)"):
        require_same_shape(x, other=x, values=torch.zeros(2))


def test_annotated_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeCheckError):
        token_mean(torch.zeros(2, 3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeCheckError):
        token_mean(torch.zeros(2, 3), torch.ones(2, 3))


def test_fill_masked() -> None:
    x = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    assert fill_masked(x, None) is x
    assert fill_masked(x, mask).tolist() == [1, 0, 3]
    assert fill_masked(x, mask, 7.0).tolist() == [1, 7, 3]
    (gradient,) = torch.autograd.grad(fill_masked(x, mask).square().sum(), x)
    assert gradient.tolist() == [2, 0, 6]
    with pytest.raises(ValueError, match="mask"):
        fill_masked(x, mask[:2])


TABLE = torch.tensor([[0.1, 0.7, 0.4], [0.9, 0.2, 0.5]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, True]])
COLUMN, ACTIONS = TABLE[:, 0], torch.tensor([1, 2])
STEPS = {"rewards": TABLE, "discounts": TABLE, "next_values": TABLE, "truncated": MASK, "mask": MASK}
CRITIC = {"rewards": TABLE, "discounts": TABLE, "values": TABLE, "next_values": TABLE, "mask": MASK}
RANGE = {"clip_low": 0.2, "clip_high": 0.2}
RATIOS = {"logprobs": TABLE, "old_logprobs": TABLE, "mask": MASK}
KL = {"logprobs": TABLE, "ref_logprobs": TABLE}
SCORES = {"scores": TABLE, "mask": MASK}
PAIR = {"chosen_log_ratios": TABLE, "rejected_log_ratios": TABLE.flip(0), "beta": 0.5}
JUDGED = {"log_ratios": TABLE, "desirable": MASK, "beta": 0.5}
FREE = {"chosen_logprobs": -TABLE, "rejected_logprobs": -TABLE.flip(0), "chosen_lengths": 1 + TABLE}
VALUES = {"values": TABLE, "mask": MASK}

CALLS: list[tuple[Callable, dict]] = [
    (returns.next_values, VALUES | {"bootstrap": COLUMN}),
    (returns.discounted_returns, STEPS),
    (returns.lambda_returns, STEPS | {"lambda_": 0.5}),
    (returns.n_step_returns, STEPS | {"num_steps": 2}),
    (returns.elapsed_discounts, {"ended": MASK, "gamma": 0.5, "mask": MASK}),
    (returns.reverse_scan, {"inputs": TABLE, "decays": TABLE, "mask": MASK}),
    (advantages.td_errors, CRITIC),
    (advantages.gae, CRITIC | {"gae_lambda": 0.5, "truncated": MASK}),
    (advantages.optimal_baseline, {"returns": TABLE, "squared_norms": TABLE}),
    (advantages.statistics_of, {"x": TABLE, "mask": MASK}),
    (advantages.whiten, {"x": TABLE, "mask": MASK}),
    (pg.log_ratio, RATIOS),
    (pg.ratio, RATIOS),
    (pg.sequence_ratio, RATIOS),
    (pg.sequence_ratio_per_token, RATIOS),
    (pg.reinforce, {"logprobs": TABLE, "advantages": TABLE}),
    (pg.reinforce_discounted, {"logprobs": TABLE, "advantages": TABLE, "elapsed_discounts": TABLE}),
    (pg.surrogate, {"ratio": TABLE, "advantages": TABLE}),
    (pg.clipped_surrogate, {"ratio": TABLE, "advantages": TABLE} | RANGE),
    (pg.dual_clipped_surrogate, {"ratio": TABLE, "advantages": TABLE, "clip_ratio": 3.0} | RANGE),
    (pg.clipped, {"ratio": TABLE, "advantages": TABLE} | RANGE),
    (pg.kl_penalized_surrogate, {"ratio": TABLE, "advantages": TABLE, "kl": TABLE, "kl_coef": 1.0}),
    (pg.cispo, {"logprobs": TABLE, "ratio": TABLE, "advantages": TABLE} | RANGE),
    (value.value_loss, {"values": TABLE, "returns": TABLE}),
    (value.clipped_value_loss, {"values": TABLE, "old_values": TABLE, "returns": TABLE, "clip": 0.2}),
    (value.huber_value_loss, {"values": TABLE, "returns": TABLE}),
    (derivatives.reinforce, {"logprobs": TABLE, "advantages": TABLE}),
    (derivatives.surrogate, {"ratio": TABLE, "advantages": TABLE}),
    (derivatives.clipped_surrogate, {"ratio": TABLE, "advantages": TABLE} | RANGE),
    (derivatives.value_loss, {"values": TABLE, "returns": TABLE}),
    (derivatives.clipped_value_loss, {"values": TABLE, "old_values": TABLE, "returns": TABLE, "clip": 0.2}),
    (derivatives.huber_value_loss, {"values": TABLE, "returns": TABLE}),
    (value.td_target, {"rewards": TABLE, "discounts": TABLE, "next_values": TABLE}),
    (value.q_learning_target, {"rewards": COLUMN, "discounts": COLUMN, "next_q": TABLE, "legal": MASK}),
    (
        value.double_q_learning_target,
        {
            "rewards": COLUMN,
            "discounts": COLUMN,
            "next_q_selecting": TABLE,
            "next_q_evaluating": TABLE,
            "legal": MASK,
        },
    ),
    (
        value.sarsa_target,
        {"rewards": COLUMN, "discounts": COLUMN, "next_q": TABLE, "next_actions": ACTIONS},
    ),
    (
        value.expected_sarsa_target,
        {"rewards": COLUMN, "discounts": COLUMN, "next_q": TABLE, "next_probs": TABLE},
    ),
    (divergence.categorical_kl, {"logprobs": TABLE, "other_logprobs": TABLE}),
    (divergence.k1, KL),
    (divergence.k2, KL),
    (divergence.k3, KL),
    (divergence.kl_penalized_rewards, {"rewards": TABLE, **KL, "kl_coef": 1.0, "mask": MASK}),
    (divergence.sequence_k2, KL | {"mask": MASK}),
    (divergence.prefix_ratio, RATIOS),
    (divergence.prefix_weighted, {"estimates": TABLE} | RATIOS),
    (divergence.token_weighted, {"estimates": TABLE} | RATIOS),
    (reduce.sequence_sum, VALUES),
    (reduce.token_mean, VALUES),
    (reduce.sequence_mean, VALUES),
    (reduce.constant_length_mean, VALUES | {"length": 2}),
    (optimum.kl_regularized_optimum, {"ref_logprobs": TABLE, "rewards": TABLE, "beta": 1.0}),
    (optimum.best_of_n_probs, {"probs": TABLE, "rewards": TABLE, "n": 2}),
    (process.process_reward_loss, {"scores": TABLE, "labels": TABLE, "mask": MASK}),
    (process.last_step_score, SCORES),
    (process.min_step_score, SCORES),
    (process.mean_step_score, SCORES),
    (process.product_step_score, SCORES),
    (pointwise.kto, JUDGED | {"kl": torch.tensor(0.1)}),
    (pointwise.bco, JUDGED | {"shift": torch.tensor(0.1)}),
    (pointwise.bco_shift, JUDGED),
    (pointwise.apo_zero, JUDGED),
    (pointwise.nca, JUDGED),
    (pointwise.sppo, {"log_ratios": TABLE, "win_probability": TABLE, "beta": 0.5}),
    (preference.bradley_terry_logprob, {"score_winner": TABLE, "score_loser": TABLE.flip(0)}),
    (preference.plackett_luce_logprob, SCORES),
    (preference.reward_model_loss, SCORES | {"margin": COLUMN, "centering_coef": 0.1}),
    (preference.implicit_rewards, KL | {"beta": 0.5}),
    (preference.dpo, PAIR),
    (preference.conservative_dpo, PAIR | {"label_smoothing": 0.1}),
    (preference.robust_dpo, PAIR | {"label_smoothing": 0.1}),
    (preference.exo, PAIR | {"label_smoothing": 0.1}),
    (preference.ipo, PAIR),
    (preference.hinge, PAIR),
    (preference.discopop, PAIR),
    (preference.apo_down, PAIR),
    (preference.rpo, PAIR | {"chosen_mean_logprobs": TABLE, "alpha": 0.5}),
    (preference.plackett_luce_dpo, KL | {"beta": 0.5, "mask": MASK}),
    (preference.match_ranks, {"values": COLUMN, "targets": COLUMN}),
    (preference.aot, {"values": TABLE, "matched": TABLE.flip(0), "beta": 0.5}),
    (
        preference.aot_unpaired,
        {**PAIR, "chosen_matched": TABLE, "rejected_matched": TABLE.flip(1)},
    ),
    (preference.wpo_weights, {"token_logprobs": -TABLE, "mask": MASK, "log_collision": TABLE}),
    (
        preference.length_desensitized_logprobs,
        {"token_logprobs": -TABLE, "mask": MASK, "shared_lengths": ACTIONS, "alpha": 0.5},
    ),
    (reference_free.simpo, FREE | {"rejected_lengths": 1 + TABLE, "beta": 0.5, "margin": 0.1}),
    (reference_free.odds_ratio_loss, FREE | {"rejected_lengths": 1 + TABLE}),
    (reference_free.orpo, FREE | {"rejected_lengths": 1 + TABLE, "coef": 0.1}),
    (reference_free.cpo, FREE | {"beta": 0.5}),
    (logprobs.label_smoothed_nll, {"logprobs": TABLE, "vocab_mean_logprobs": TABLE, "label_smoothing": 0.1}),
    (logprobs.sequence_logprobs, {"logprobs": TABLE, "mask": MASK}),
]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The objectives as they are outside of tests, where no annotation is checked."""
    for module in {inspect.getmodule(function) for function, _ in CALLS}:
        for name, function in inspect.getmembers(module, lambda member: hasattr(member, "__wrapped__")):
            monkeypatch.setattr(module, name, function.__wrapped__)


def required(function: Callable, arguments: dict) -> dict:
    """The arguments without masks and whatever else may be None."""
    parameters = inspect.signature(function).parameters
    return {name: argument for name, argument in arguments.items() if parameters[name].default is not None}


def rows(arguments: dict, pick: Callable[[Tensor], Tensor]) -> dict:
    """The arguments with something done to all that have rows."""
    return {
        name: pick(argument) if isinstance(argument, Tensor) and argument.ndim else argument
        for name, argument in arguments.items()
    }


@pytest.mark.parametrize(
    ("function", "arguments", "wrong"),
    [
        pytest.param(function, arguments, name, id=f"{function.__name__}-{name}")
        for function, arguments in CALLS
        for name, argument in arguments.items()
        if isinstance(argument, Tensor) and argument.ndim
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_would_broadcast_is_refused(function: Callable, arguments: dict, wrong: str) -> None:
    """One row for all in place of one for each."""
    for given in (arguments, required(function, arguments)):
        function.__wrapped__(**given)
        if wrong in given and sum(isinstance(argument, Tensor) for argument in given.values()) > 1:
            with pytest.raises(ValueError, match="has the shape"):
                function.__wrapped__(**given | {wrong: given[wrong][:1]})


COUPLING = [
    *(advantages.optimal_baseline, advantages.statistics_of, advantages.whiten, pointwise.bco_shift),
    *(preference.match_ranks, reduce.token_mean, reduce.sequence_mean, reduce.constant_length_mean),
]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [pytest.param(*call, id=call[0].__name__) for call in CALLS if call[0] not in COUPLING],
)
def test_a_row_is_computed_as_if_it_were_alone(function: Callable, arguments: dict) -> None:
    """With any number of leading dimensions, and none."""
    for given in (arguments, required(function, arguments)):
        together = function(**given)
        alone = [function(**rows(given, lambda x, row=row: x[row])) for row in range(2)]
        nested = function(**rows(given, lambda x: x[None, :, None]))
        if isinstance(together, tuple):
            together, alone, nested = together[0], [first for first, _ in alone], nested[0]
        torch.testing.assert_close(torch.stack(alone), together, rtol=0, atol=1e-15)
        torch.testing.assert_close(nested.reshape(together.shape), together, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("function", "arguments"), [pytest.param(*call, id=call[0].__name__) for call in CALLS])
def test_one_entry_is_enough(function: Callable, arguments: dict) -> None:
    """A row of one step, one token, one completion or one action."""
    function(
        **rows(arguments, lambda x: x[..., 1:2] if x.ndim == 2 else x.clamp(max=0) if x.dtype == torch.long else x)
    )


TARGETS = [
    *(returns.discounted_returns, returns.lambda_returns, returns.n_step_returns, advantages.td_errors, advantages.gae),
]
"""Constants to whoever calls: nobody takes a gradient through a discount."""


@pytest.mark.parametrize(
    ("function", "arguments"),
    [pytest.param(*call, id=call[0].__name__) for call in CALLS if "mask" in call[1]],
)
def test_what_is_masked_can_t_leak(function: Callable, arguments: dict) -> None:
    """Into the result, or into its gradient."""

    def outcome(filling: float) -> list[Tensor]:
        given = {
            name: argument.masked_fill(~MASK, filling).requires_grad_(function not in TARGETS)
            if isinstance(argument, Tensor) and argument.shape == MASK.shape and argument.is_floating_point()
            else argument
            for name, argument in arguments.items()
        }
        result = function(**given)
        results = result if isinstance(result, tuple) else (result,)
        differentiable = [each for each in results if each.requires_grad]
        leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
        if not differentiable:
            return list(results)
        weighed = sum((each * torch.arange(1, 1 + each.numel()).view(each.shape)).sum() for each in differentiable)
        gradients = torch.autograd.grad(weighed, leaves, allow_unused=True)
        return [*results, *(gradient for gradient in gradients if gradient is not None)]

    for clean, spoilt in zip(outcome(0.5), outcome(math.nan), strict=True):
        assert torch.equal(clean, spoilt)
