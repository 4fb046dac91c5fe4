"""LoRA: starts as the reference, switches off and on exactly, merges into a plain checkpoint."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from trueup.errors import MissingExtraError, ModelError, SettingsError
from trueup.models.adapters import (
    add_lora,
    has_adapter,
    load_adapter,
    merge_and_save,
    merged_state_dict,
    reference_mode,
    save_adapter,
)

IDS = torch.arange(3, 15)[None]
FAMILIES = ["llama", "qwen2", "gpt2", "gpt_neox", "gemma3_text", "opt", "qwen3_moe"]


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_a_little(model: PreTrainedModel) -> None:
    """Move every trainable weight, adapters' second factors (which start at zero) included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_reference_and_reference_mode_is_exact(tiny_model, family):
    model = tiny_model(family)
    base = outputs(model)
    assert add_lora(model, rank=2) is model
    assert all("lora_" in name for name in trainable(model))
    assert torch.equal(outputs(model), base), "the second factor is zero, so nothing changes at first"
    train_a_little(model)
    trained = outputs(model)
    assert not torch.allclose(trained, base)
    with reference_mode(model):
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model), trained)


def test_reference_mode_nests_and_survives_exceptions(tiny_model):
    model = tiny_model("llama")
    base = outputs(model)
    add_lora(model, rank=2)
    train_a_little(model)
    trained = outputs(model)
    with reference_mode(model):
        with reference_mode(model):
            assert torch.equal(outputs(model), base)
        assert torch.equal(outputs(model), base), "the inner block must not end the outer one"
        with pytest.raises(RuntimeError, match="inside"), reference_mode(model):
            raise RuntimeError("inside")
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model), trained)
    with pytest.raises(RuntimeError, match="inside"), reference_mode(model):
        raise RuntimeError("inside")
    assert torch.equal(outputs(model), trained)


def test_reference_mode_leaves_gradients_and_their_hooks_alone(tiny_model):
    model = add_lora(tiny_model("llama"), rank=2)
    before = list(trainable(model))
    calls = []
    handles = [p.register_post_accumulate_grad_hook(lambda _: calls.append(1)) for p in trainable(model).values()]
    with reference_mode(model):
        outputs(model)
        assert list(trainable(model)) == before
    model(IDS).logits.sum().backward()
    assert len(calls) == len(before)
    for handle in handles:
        handle.remove()


def test_reference_mode_without_adapter(tiny_model):
    with pytest.raises(ModelError, match="no adapter"), reference_mode(tiny_model("llama")):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_checkpoint_loads_in_plain_transformers(tiny_model, tmp_path, family):
    model = add_lora(tiny_model(family), rank=2, alpha=3.0)
    train_a_little(model)
    trained, before = outputs(model), {name: p.clone() for name, p in model.state_dict().items()}
    merge_and_save(model, tmp_path)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not has_adapter(plain)
    torch.testing.assert_close(outputs(plain.eval()), trained, atol=2e-5, rtol=1e-4)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, before[name]), f"saving changed {name}"
    assert not (tmp_path / "adapter_config.json").exists()


def test_merge_agrees_with_peft(tiny_model):
    wrapped = peft.get_peft_model(tiny_model("gpt2"), peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
    model = wrapped.get_base_model()
    train_a_little(model)
    ours = merged_state_dict(model)
    theirs = wrapped.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-5)


def test_bfloat16_base_keeps_float32_adapters_and_merges_with_one_rounding(tiny_model, tmp_path):
    model = add_lora(tiny_model("llama").to(torch.bfloat16), rank=2)
    train_a_little(model)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    merge_and_save(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == torch.bfloat16
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, exact.bfloat16())


def test_a_reward_models_head_is_trained_whole(tiny_model, tmp_path):
    model = add_lora(tiny_model("llama", num_labels=1), rank=2)
    heads = [name for name in trainable(model) if name.startswith("score.")]
    assert len(heads) == 1
    assert all("lora_" in name for name in trainable(model) if name not in heads)
    base = outputs(model)
    train_a_little(model)
    trained = outputs(model)
    with reference_mode(model):
        assert torch.equal(outputs(model), base)
    merge_and_save(model, tmp_path)
    plain, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(outputs(plain.eval()), trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_labels", [None, 1], ids=["causal", "reward"])
def test_adapter_alone_comes_back_here_and_in_peft(tiny_model, tmp_path, num_labels):
    model = add_lora(tiny_model("qwen2", num_labels=num_labels), rank=2, alpha=8, dropout=0.1)
    train_a_little(model)
    trained = outputs(model)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 8, 0.1)

    ours = load_adapter(tiny_model("qwen2", num_labels=num_labels), tmp_path)
    assert torch.equal(outputs(ours.eval()), trained)
    assert trainable(ours).keys() == trainable(model).keys()
    with reference_mode(ours):
        assert torch.equal(outputs(ours), outputs(tiny_model("qwen2", num_labels=num_labels)))

    theirs = peft.PeftModel.from_pretrained(tiny_model("qwen2", num_labels=num_labels), str(tmp_path))
    assert torch.equal(outputs(theirs.eval()), trained)


def test_the_seed_fixes_the_adapter_and_the_global_stream_is_left_alone(tiny_model):
    def first_factor(seed: int) -> torch.Tensor:
        model = add_lora(tiny_model("llama"), rank=2, seed=seed)
        return model.model.layers[0].mlp.up_proj.lora_A["default"].weight

    torch.manual_seed(9)
    before = torch.get_rng_state()
    model = tiny_model("llama", seed=1)
    torch.set_rng_state(before)
    add_lora(model, rank=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first_factor(3), first_factor(3))
    assert not torch.equal(first_factor(3), first_factor(4))


def test_chosen_target_modules(tiny_model):
    model = add_lora(tiny_model("llama"), rank=2, target_modules=["q_proj", "v_proj"])
    assert {name.split(".")[4] for name in trainable(model)} == {"q_proj", "v_proj"}


def test_an_untied_head_can_carry_an_adapter(tiny_model, tmp_path):
    model = add_lora(tiny_model("llama"), rank=2, target_modules=["q_proj", "lm_head"])
    train_a_little(model)
    merge_and_save(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(plain), outputs(model), atol=1e-5, rtol=1e-4)


def test_a_tied_head_can_not(tiny_model):
    with pytest.raises(ModelError, match="shares its weights"):
        add_lora(tiny_model("gemma3_text"), rank=2, target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize("changed", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_numbers_out_of_range(tiny_model, changed):
    model = tiny_model("llama")
    with pytest.raises(SettingsError, match=next(iter(changed))):
        add_lora(model, **({"rank": 2} | changed))
    assert not has_adapter(model)


def test_nothing_to_adapt_and_adapters_twice(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="target_modules"):
        add_lora(model, rank=2, target_modules=["no_such_layer"])
    add_lora(model, rank=2)
    with pytest.raises(ModelError, match="already"):
        add_lora(model, rank=2)


def test_a_folder_without_adapter_and_one_that_does_not_fit(tiny_model, tmp_path):
    with pytest.raises(ModelError, match="holds no adapter"):
        load_adapter(tiny_model("llama"), tmp_path)
    save_adapter(add_lora(tiny_model("llama"), rank=2), tmp_path)
    with pytest.raises(ModelError, match="doesn't fit"):
        load_adapter(tiny_model("gpt2"), tmp_path)
    with pytest.raises(ModelError, match="no adapter to save"):
        save_adapter(tiny_model("llama"), tmp_path)


def test_a_model_without_adapter_is_saved_as_it_is(tiny_model, tmp_path):
    model = tiny_model("llama")
    merge_and_save(model, tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), outputs(model))


def test_without_peft_the_message_names_the_extra(tiny_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"trueup\[lora\]"):
        add_lora(tiny_model("llama"), rank=2)
