"""What every objective checks on its own, where no run-time checker of annotations is installed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from trueup.objectives import advantages, divergence, logprobs, optimum, pointwise, process, reduce, returns, value
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


TABLE, MASK, COLUMN = torch.full((2, 3), 0.5), torch.ones(2, 3, dtype=torch.bool), torch.full((2,), 0.5)
ACTIONS = torch.zeros(2, dtype=torch.long)
STEPS = {"rewards": TABLE, "discounts": TABLE, "next_values": TABLE, "truncated": MASK, "mask": MASK}
CRITIC = {"rewards": TABLE, "discounts": TABLE, "values": TABLE, "next_values": TABLE, "mask": MASK}
RANGE = {"clip_low": 0.2, "clip_high": 0.2}
RATIOS = {"logprobs": TABLE, "old_logprobs": TABLE, "mask": MASK}
KL = {"logprobs": TABLE, "ref_logprobs": TABLE}
SCORES = {"scores": TABLE, "mask": MASK}
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
    (pg.clipped_surrogate, {"ratio": TABLE, "advantages": TABLE} | RANGE),
    (pg.dual_clipped_surrogate, {"ratio": TABLE, "advantages": TABLE, "clip_ratio": 3.0} | RANGE),
    (pg.clipped, {"ratio": TABLE, "advantages": TABLE} | RANGE),
    (pg.kl_penalized_surrogate, {"ratio": TABLE, "advantages": TABLE, "kl": TABLE, "kl_coef": 1.0}),
    (pg.cispo, {"logprobs": TABLE, "ratio": TABLE, "advantages": TABLE} | RANGE),
    (value.value_loss, {"values": TABLE, "returns": TABLE}),
    (value.clipped_value_loss, {"values": TABLE, "old_values": TABLE, "returns": TABLE, "clip": 0.2}),
    (value.huber_value_loss, {"values": TABLE, "returns": TABLE}),
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
    (pointwise.kto, {"log_ratios": TABLE, "desirable": MASK, "kl": torch.tensor(0.0), "beta": 1.0}),
    (logprobs.label_smoothed_nll, {"logprobs": TABLE, "vocab_mean_logprobs": TABLE, "label_smoothing": 0.1}),
    (logprobs.sequence_logprobs, {"logprobs": TABLE, "mask": MASK}),
]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The objectives as they are outside of tests, where no annotation is checked."""
    for module in {inspect.getmodule(function) for function, _ in CALLS}:
        for name, function in inspect.getmembers(module, lambda member: hasattr(member, "__wrapped__")):
            monkeypatch.setattr(module, name, function.__wrapped__)


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
    function.__wrapped__(**arguments)
    with pytest.raises(ValueError, match="has the shape"):
        function.__wrapped__(**arguments | {wrong: arguments[wrong][:1]})
