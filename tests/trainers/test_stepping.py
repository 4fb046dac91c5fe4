"""Learning-rate schedule, optimiser groups, clipping, and what happens to a gradient that is not a number."""

from __future__ import annotations

import math

import pytest
import torch

from trueup.errors import ModelError
from trueup.models.load import load_model
from trueup.models.scratch import make_model
from trueup.trainers.settings import SFTSettings
from trueup.trainers.stepping import Stepper, lr_scale
from trueup.trainers.trained_model import load_trained


def test_schedules_by_hand():
    scale = [lr_scale(n, warmup_steps=4, total_steps=8, schedule="linear") for n in range(8)]
    assert scale == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    scale = [lr_scale(n, warmup_steps=0, total_steps=4, schedule="cosine") for n in range(4)]
    assert scale == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    scale = [lr_scale(n, warmup_steps=2, total_steps=4, schedule="constant") for n in range(4)]
    assert scale == [0.5, 1.0, 1.0, 1.0]


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_starts_from_the_weights_as_stored(tmp_path, dtype):
    """The model computes in its type; what the optimiser works on has lost nothing to it."""
    folder = make_model(tmp_path / "model", characters="ab", hidden_size=8, num_layers=1, num_heads=2)
    settings = SFTSettings(model=str(folder), dtype=dtype)
    model, _ = load_trained(settings)
    stepper = Stepper(model, settings, total_steps=1)
    stored = load_model(folder, dtype="float32").model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert any((p != p.bfloat16()).any() for p in stored.parameters())
    for (name, expected), found, low in zip(
        stored.named_parameters(), stepper.masters.parameters, model.parameters(), strict=True
    ):
        assert torch.equal(found, expected), name
        assert torch.equal(low, expected.to(low.dtype)), name


def test_weight_decay_spares_vectors():
    stepper = Stepper(module(), SFTSettings(weight_decay=0.1), total_steps=1)
    decays = {
        group["params"][0].ndim: (group["weight_decay"], len(group["params"]))
        for group in stepper.optimizer.param_groups
    }
    assert decays == {2: (0.1, 1), 1: (0.0, 1)}


def test_sgd_step_is_the_clipped_gradient():
    net = module()
    before = net.weight.detach().clone()
    stepper = Stepper(net, SFTSettings(optimizer="sgd", learning_rate=0.5, max_grad_norm=1.0), total_steps=4)
    net.weight.grad, net.bias.grad = torch.full_like(net.weight, 3.0), torch.zeros_like(net.bias)
    norm, rate = stepper.step(2)
    assert norm == pytest.approx(3 * math.sqrt(6))
    assert rate == 0.25
    expected = before - 0.25 * torch.full_like(before, 1 / math.sqrt(6))
    torch.testing.assert_close(net.weight.detach(), expected)
    assert net.weight.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float):
    net = module()
    stepper = Stepper(net, SFTSettings(), total_steps=4)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.weight.grad, net.bias.grad = torch.full_like(net.weight, bad), torch.ones_like(net.bias)
    norm, _ = stepper.step(0)
    assert not math.isfinite(norm)
    assert all(torch.equal(p.detach(), before[name]) for name, p in net.named_parameters())
    assert net.weight.grad is None


def test_state_goes_round():
    def run(net: torch.nn.Module, stepper: Stepper, steps: range) -> None:
        for n in steps:
            torch.manual_seed(n)
            net(torch.randn(5, 3)).square().sum().backward()
            stepper.step(n)

    whole, settings = module(), SFTSettings(learning_rate=0.1)
    run(whole, Stepper(whole, settings, 6), range(6))

    first = module()
    stepper = Stepper(first, settings, 6)
    run(first, stepper, range(3))
    second = module()
    resumed = Stepper(second, settings, 6)
    resumed.load_state_dict(stepper.state_dict())
    run(second, resumed, range(3, 6))
    assert torch.equal(whole.weight, second.weight)
    assert torch.equal(whole.bias, second.bias)


def test_a_closed_stepper_leaves_the_gradients_to_the_next():
    """Two runs on one bfloat16 object: the first's master weights must not go on taking its gradients."""
    net = module().bfloat16()
    for _ in range(2):
        before = net.weight.detach().clone()
        stepper = Stepper(net, SFTSettings(optimizer="sgd", learning_rate=1.0), total_steps=1)
        net(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        norm, _ = stepper.step(0)
        stepper.close()
        assert norm > 0
        assert not torch.equal(net.weight, before)


def test_a_frozen_model_is_refused():
    with pytest.raises(ModelError, match="frozen"):
        Stepper(module().requires_grad_(False), SFTSettings(), total_steps=1)
