"""A residual stream in float32 makes a bfloat16 model more exact, and leaves no trace outside of a scorer."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from trueup.models import scorer as scorer_module
from trueup.models.adapters import add_lora
from trueup.models.precision import MasterWeights, round_parameters
from trueup.models.residual import float32_residual
from trueup.models.scorer import Scorer, prepare_reward_scorer, prepare_scorer, vocabulary_layers
from trueup.models.tree import TreeBatch, tree_batch


@pytest.fixture(scope="module")
def batch(make_groups) -> TreeBatch:
    return tree_batch(make_groups([(9, (8, 5, 11)), (1, (12,)), (6, (7, 2))]))


def rounded(model: Any) -> tuple[Any, Any]:
    """(the model in bfloat16, the same weights in float32)."""
    low = copy.deepcopy(model)
    round_parameters(low, torch.bfloat16)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), low.parameters(), strict=True):
            parameter.copy_(value)
    return low, model


def quietly(model: nn.Module) -> Scorer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_scorer(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_deep_model_comes_nearer_to_float32(tiny_model, batch, family) -> None:
    """Where each layer adds little to a large stream, as in trained models, rounding the sums is most of the error."""
    layers = {"n_layer": 12} if family == "gpt2" else {"num_hidden_layers": 12, "layer_types": None}
    deep = tiny_model(family, **layers)
    with torch.no_grad():
        for name, parameter in deep.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
                parameter.mul_(0.03)
    low, exact = rounded(deep)
    scorer, truth = quietly(low), quietly(exact)

    def measured(scorer: Scorer) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = scorer(batch).logprobs
        used = [p for name, p in scorer.named_parameters() if "mlp" in name and p.ndim > 1]
        grads = torch.autograd.grad(logprobs.sum(), used)
        return logprobs.detach(), torch.cat([g.float().flatten() for g in grads])

    true, wide = measured(truth), measured(scorer)
    scorer.float32_residual = False
    narrow = measured(scorer)
    for name, a, b, c in zip(("log-probs", "gradient"), wide, narrow, true, strict=True):
        assert (a - c).norm() < 0.8 * (b - c).norm(), name


def test_the_stream_and_its_gradient_are_float32(tiny_model, batch) -> None:
    """At the embedding, after every layer, and in the gradient that the embedding's sum is given."""
    model, _ = rounded(tiny_model("llama"))
    scorer = prepare_scorer(model)
    masters = MasterWeights(model.parameters(), vocabulary_layers(scorer))
    seen: list[torch.dtype] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, out: seen.extend((inputs[0].dtype, out.dtype)))
        layer.register_full_backward_hook(lambda module, given, got: seen.append(got[0].dtype))
        layer.mlp.gate_proj.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].dtype))
    scorer(batch).logprobs.sum().backward()
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert seen.count(torch.bfloat16) == len(model.model.layers)
    masters.close()


def test_nothing_of_it_is_left_behind(tiny_model, batch) -> None:
    """A plain forward pass and generation are to the bit what they were, and no hook stays, whatever happens inside."""
    model, _ = rounded(tiny_model("llama"))
    tokens = batch.tokens[None, :9]

    def outside() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return model(tokens).logits, model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)

    before = outside()
    scorer = prepare_scorer(model)
    scorer(batch)
    with pytest.raises(KeyError), float32_residual(model, torch.bfloat16):
        raise KeyError
    for found, expected in zip(outside(), before, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert not any(module._forward_hooks for module in model.modules())
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_recomputes_the_same(tiny_model, batch, lora) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model, _ = rounded(tiny_model("llama"))
        if lora:
            add_lora(model, rank=2)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.fill_(0.1)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        scorer = prepare_scorer(model).train()
        assert scorer.float32_residual
        scorer(batch).logprobs.sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reward_models_take_it(tiny_model, batch, family) -> None:
    low, exact = rounded(tiny_model(family, num_labels=1))
    scorer, truth = prepare_reward_scorer(low), prepare_reward_scorer(exact)
    assert scorer.float32_residual
    torch.testing.assert_close(scorer(batch), truth(batch), rtol=0.02, atol=0.1)


def test_a_model_that_can_not_take_it_computes_as_it_is(tiny_model, batch, monkeypatch) -> None:
    class OneType(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if input.dtype != self.weight.dtype:
                raise RuntimeError("expected both in one type")
            return super().forward(input)

    model, _ = rounded(tiny_model("llama"))
    monkeypatch.setattr(scorer_module, "swap_norms", lambda model: None)  # then norms give float32
    model.model.layers[1].mlp.up_proj.__class__ = OneType
    scorer = prepare_scorer(model)
    assert not scorer.float32_residual
    assert scorer(batch).logprobs.isfinite().all()
