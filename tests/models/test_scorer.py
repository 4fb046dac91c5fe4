"""The scorer's promises: heads, adapters, checkpointing, invariances, determinism; and what its check leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from trueup.errors import ModelError
from trueup.models import attention
from trueup.models import check as check_module
from trueup.models import scorer as scorer_module
from trueup.models.adapters import add_lora
from trueup.models.check import CHECK_LIMITS
from trueup.models.precision import MasterWeights
from trueup.models.scorer import Scorer, prepare_reward_scorer, prepare_scorer, vocabulary_layers
from trueup.models.tree import TreeBatch, tree_batch
from trueup.objectives.logprobs import TokenStatistics

SHAPES = [(9, (8, 5, 11)), (1, (12,)), (6, (7, 2))]


@pytest.fixture(scope="module")
def batch(make_groups) -> TreeBatch:
    return tree_batch(make_groups(SHAPES))


def gradients(model: Any, values: torch.Tensor, seed: int = 1) -> dict[str, torch.Tensor]:
    """Of a random weighting of the values, by the name of the parameter."""
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad((values * weights).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4 * max(1.0, float(value.abs().max())))


# --- heads and adapters

LORA: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head, rank-stabilised": {"target_modules": ["down_proj", "lm_head"], "use_rslora": True},
    "head, DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "head trained in full": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
}


def with_lora(model: Any, **options: Any) -> Any:
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:  # B starts at 0, which would hide the adapter
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("adapter", LORA)
def test_lora_is_the_plain_forward_pass(tiny_model, plain_logprobs, batch, family, adapter) -> None:
    model = with_lora(tiny_model(family, tie_word_embeddings=False), **LORA[adapter])
    scorer = prepare_scorer(model)
    assert scorer.path == "tree"
    found, expected = scorer(batch).logprobs, plain_logprobs(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
    assert_close(gradients(model, found), gradients(model, expected))
    with model.disable_adapter(), torch.no_grad():
        reference, plain = scorer(batch).logprobs, plain_logprobs(model, batch)
    torch.testing.assert_close(reference, plain, rtol=0, atol=3e-5)
    assert (reference - found).abs().max() > 0.1


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "lm_head"]])
def test_adapters_in_float32_on_a_bfloat16_model(tiny_model, batch, targets) -> None:
    model = tiny_model("llama", tie_word_embeddings=False).bfloat16()
    add_lora(model, rank=3, target_modules=targets)
    scorer = prepare_scorer(model)
    assert scorer.path == "tree"
    found = gradients(model, scorer(batch).logprobs)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all(float(gradient.abs().max()) > 0 for name, gradient in found.items() if "lora_B" in name)


def test_lora_dropout_on_the_head_is_the_same_in_both_passes(tiny_model, batch) -> None:
    """The logits of a chunk are computed twice: were the second mask another, the slope would not be the gradient's."""
    model = with_lora(tiny_model("llama").double(), target_modules=["lm_head"])
    head = model.get_base_model().lm_head
    head.lora_dropout["default"] = torch.nn.Dropout(0.5)
    scorer = prepare_scorer(model)
    scorer.train()
    weight = head.lora_A["default"].weight
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return scorer(batch).logprobs.sum()

    slope = (torch.autograd.grad(loss(), weight)[0] * direction).sum()
    with torch.no_grad():
        weight += 1e-6 * direction
        above = loss()
        weight -= 2e-6 * direction
        below = loss()
    torch.testing.assert_close(slope, (above - below) / 2e-6, rtol=1e-5, atol=0)


def test_tied_embeddings_get_both_gradients(tiny_model, plain_logprobs, batch) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    scorer = prepare_scorer(model)
    assert_close(gradients(model, scorer(batch).logprobs), gradients(model, plain_logprobs(model, batch)))


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "phi"])
@pytest.mark.parametrize("lora", [False, True])
def test_temperature_and_statistics(tiny_model, batch, family, lora) -> None:
    """Against the definition on the model's own logits, head with a scale, a cap, a bias."""
    model = tiny_model(family)
    if lora:
        model = with_lora(model, target_modules=["lm_head"])
    scorer = prepare_scorer(model)
    scores = scorer(batch, temperature=0.7, want=TokenStatistics._fields[1:])
    rows = batch.padded()
    lengths = rows.attention_mask.sum(-1).tolist()
    alone = [model(input_ids=row[None, :n]).logits[0] for row, n in zip(rows.tokens, lengths, strict=True)]
    logits = torch.cat([own[-n - 1 : -1] for own, n in zip(alone, batch.lengths.tolist(), strict=True)])
    expected = torch.distributions.Categorical(logits=logits / 0.7)
    torch.testing.assert_close(scores.logprobs, expected.log_prob(batch.targets), rtol=0, atol=3e-5)
    both = torch.cat([scores.entropy, scores.vocab_mean_logprobs])
    truth = torch.cat([expected.entropy(), expected.logits.mean(-1)])
    assert_close(gradients(model, both), gradients(model, truth))
    assert not scores.log_collision.requires_grad
    for value, true in (
        (scores.entropy, expected.entropy()),
        (scores.vocab_mean_logprobs, expected.logits.mean(-1)),
        (scores.log_collision, expected.probs.square().sum(-1).log()),
    ):
        torch.testing.assert_close(value, true, rtol=0, atol=3e-5)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.numel = max([self.numel, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("lora", [False, True])
def test_logits_of_all_tokens_never_exist(tiny_model, make_groups, lora) -> None:
    vocab = 5000
    model = tiny_model("llama", vocab_size=vocab, tie_word_embeddings=False)
    if lora:
        model = with_lora(model, target_modules=["lm_head"])
    batch = tree_batch(make_groups([(5, (200, 200)), (5, (200, 200))], vocab=vocab))
    scorer = Scorer(model, "padded")
    with Largest() as largest:
        scores = scorer(batch, want=TokenStatistics._fields[1:])
        (scores.logprobs.sum() + scores.entropy.sum() + scores.vocab_mean_logprobs.sum()).backward()
    assert largest.numel <= max(128, 800 * 1024 / vocab) * vocab * 1.1
    assert largest.numel < len(batch.targets) * vocab / 4


# --- training's other switches


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_gradient_checkpointing_keeps_the_layout(tiny_model, batch, family) -> None:
    model = tiny_model(family, hidden_dropout=0.0, dropout=0.0, attention_dropout=0.0)
    scorer = prepare_scorer(model)
    expected = gradients(model, scorer(batch).logprobs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer.train()
    found = scorer(batch).logprobs
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_close(gradients(model, found), expected)


def test_dropout_acts_in_training_only(tiny_model, batch) -> None:
    scorer = prepare_scorer(tiny_model("llama", attention_dropout=0.4))
    quiet = scorer(batch).logprobs
    assert torch.equal(quiet, scorer(batch).logprobs)
    scorer.train()
    torch.manual_seed(0)
    once = scorer(batch).logprobs
    torch.manual_seed(0)
    assert torch.equal(once, scorer(batch).logprobs)
    assert (once - quiet).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_gradient_is_the_same_to_the_bit_on_two_threads(tiny_model, make_groups, family) -> None:
    """What exact resume rests on. Completions that share a prompt's last state are what makes a gather collide."""
    batch = tree_batch(make_groups([(9, (8, 5, 11, 6))] * 4))
    model = tiny_model(family, tie_word_embeddings=True)
    scorer = prepare_scorer(model)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [gradients(model, batch.rows(scorer(batch).logprobs).sum(-1)) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_bfloat16_is_close_to_the_plain_forward_pass_in_bfloat16(tiny_model, plain_logprobs, batch, family) -> None:
    """Both round at 2^-9 in every layer, so neither is the truth: they may be as far from each other as from float32.

    Tolerance: mean distance to float32 at most 1.5 times that of the plain bfloat16 forward pass.
    """
    model = tiny_model(family)
    truth = plain_logprobs(model, batch).detach()
    model = model.bfloat16()
    scorer = prepare_scorer(model)
    assert scorer.path == "tree"
    with torch.no_grad():
        found, plain = scorer(batch).logprobs, plain_logprobs(model, batch)
    assert found.dtype == torch.float32
    assert (found - truth).abs().mean() <= 1.5 * (plain - truth).abs().mean()


# --- invariances


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_order_and_splitting_of_groups_change_nothing(tiny_model, make_groups, family) -> None:
    groups = make_groups(SHAPES)
    model = tiny_model(family)
    scorer = prepare_scorer(model)
    whole = scorer(tree_batch(groups)).logprobs
    expected = gradients(model, whole.sum()[None])
    by_completion = dict(zip(_names(groups), whole.split(tree_batch(groups).lengths.tolist()), strict=True))

    halves = [part for group in groups for part in _split(group)]
    singles = [copy_of(group, [completion]) for group in groups for completion in group.completions]
    for other in (groups[::-1], halves, singles, singles[::-1]):
        batch = tree_batch(other)
        found = scorer(batch).logprobs
        for name, logprobs in zip(_names(other), found.split(batch.lengths.tolist()), strict=True):
            torch.testing.assert_close(logprobs, by_completion[name], rtol=0, atol=2e-5)
        assert_close(gradients(model, found.sum()[None]), expected)


def test_micro_batches_add_up_to_the_gradient_of_the_batch(tiny_model, make_groups) -> None:
    groups = make_groups(SHAPES)
    model = tiny_model("qwen2")
    scorer = prepare_scorer(model)
    expected = gradients(model, scorer(tree_batch(groups)).logprobs.sum()[None])
    parts = [gradients(model, scorer(tree_batch([group])).logprobs.sum()[None]) for group in groups]
    weight = float(torch.randn(1, generator=torch.Generator().manual_seed(1)))
    assert weight != 0
    assert_close({name: sum(part[name] for part in parts) for name in expected}, expected)  # pyright: ignore


def copy_of(group: Any, completions: Any) -> Any:
    return type(group)(prompt=group.prompt, completions=tuple(completions))


def _split(group: Any) -> list[Any]:
    first, *rest = group.completions
    return [copy_of(group, [first]), *([copy_of(group, rest)] if rest else [])]


def _names(groups: Any) -> list[tuple[int, ...]]:
    return [(*group.prompt, -1, *completion.tokens) for group in groups for completion in group.completions]


# --- the check and its surroundings


@pytest.mark.parametrize("family", ["gemma2", "mistral", "lfm2"])
@pytest.mark.filterwarnings("ignore:.*can't use the tree batch")
def test_the_check_leaves_everything_as_it_was(tiny_model, family) -> None:
    model = tiny_model(family)
    model.train()
    model.base_model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    limits = {name: getattr(model.config, name, None) for name in CHECK_LIMITS}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    prepare_scorer(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: getattr(model.config, name, None) for name in CHECK_LIMITS} == limits
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_saved_model_knows_nothing_of_the_tree(tiny_model, plain_logprobs, batch, tmp_path) -> None:
    model = tiny_model("llama")
    scorer = prepare_scorer(model)
    model.save_pretrained(tmp_path)
    assert "trueup" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(plain_logprobs(loaded, batch), scorer(batch).logprobs, rtol=0, atol=2e-5)


def test_a_large_model_is_checked_as_it_is(tiny_model, monkeypatch) -> None:
    """No copy is made, and in bfloat16 the tolerance is that of bfloat16: rounding passes, a lost window does not."""
    monkeypatch.setattr(check_module, "SMALL", 0)
    monkeypatch.setattr(check_module, "copy", None)
    model = tiny_model("mistral").bfloat16()
    assert prepare_scorer(model).path == "tree"
    whole = attention.tree_attention
    monkeypatch.setattr(attention, "tree_attention", lambda *a, **options: whole(*a, **(options | {"window": None})))
    with pytest.warns(UserWarning, match="more than 3e-02"):
        assert prepare_scorer(model).path == "padded"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen2"])
def test_generation_is_what_it_was(tiny_model, family) -> None:
    """Left-padded prompts, a cache, a window: without a layout, the tree's attention is the model's own."""
    model = tiny_model(family)
    prompts = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]])
    options: dict[str, Any] = {
        "attention_mask": (prompts != 0).long(),
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    model.config._attn_implementation = "eager"
    before = model.generate(prompts, **options)
    prepare_scorer(model)
    after = model.generate(prompts, **options)
    assert torch.equal(after.sequences, before.sequences)
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(before.logits), rtol=0, atol=3e-5)


def test_a_frozen_copy_scores_the_same(tiny_model, batch) -> None:
    scorer = prepare_scorer(tiny_model("llama"))
    frozen = copy.deepcopy(scorer)
    expected = scorer(batch).logprobs
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight.add_(1.0)  # pyright: ignore
    assert torch.equal(frozen(batch).logprobs, expected)
    assert not torch.equal(scorer(batch).logprobs, expected)


@pytest.mark.filterwarnings("ignore:.*can't use the tree batch")
def test_a_head_that_does_something_unknown_is_left_to_the_model(tiny_model, plain_logprobs, batch) -> None:
    model = tiny_model("llama")
    model.forward = _with_logits(model, lambda logits: 1.7 * logits + torch.arange(logits.shape[-1]) / 50)
    scorer = prepare_scorer(model)
    assert scorer.own_head
    found, expected = scorer(batch, want=["entropy"]), plain_logprobs(model, batch)
    assert found.entropy.shape == found.logprobs.shape
    assert found.log_collision is None
    torch.testing.assert_close(found.logprobs, expected, rtol=0, atol=3e-5)
    assert_close(gradients(model, found.logprobs), gradients(model, expected))


def test_a_model_that_nothing_reproduces_is_refused(tiny_model) -> None:
    model = tiny_model("llama")
    model.forward = _with_logits(model, lambda logits: logits * (1 + len(logits)))
    with pytest.raises(ModelError, match="no way to run LlamaForCausalLM"):
        prepare_scorer(model)


def _with_logits(model: Any, change: Any) -> Any:
    forward = model.forward

    def changed(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.logits = change(out.logits)
        return out

    return changed


def test_a_causal_model_has_no_reward_head(tiny_model) -> None:
    with pytest.raises(ModelError, match="num_labels=1"):
        prepare_reward_scorer(tiny_model("llama"))
    with pytest.raises(ModelError, match="num_labels=1"):
        prepare_reward_scorer(tiny_model("llama", num_labels=2))


def test_prompt_learning_adapters_are_refused(tiny_model) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="prompt-learning"):
        prepare_scorer(peft.get_peft_model(tiny_model("llama"), config))  # pyright: ignore


def test_reward_model_with_lora_and_trained_head(tiny_model, batch) -> None:
    model = with_lora(
        tiny_model("llama", num_labels=1), target_modules=["q_proj", "up_proj"], modules_to_save=["score"]
    )
    scorer = prepare_reward_scorer(model)
    assert scorer.path == "tree"
    rows = batch.padded()
    expected = model(input_ids=rows.tokens, attention_mask=rows.attention_mask).logits[:, 0]
    found = scorer(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
    assert_close(gradients(model, found), gradients(model, expected))


# --- what makes it fast leaves the numbers as they are


def test_padding_the_stream_changes_nothing(tiny_model, batch, monkeypatch) -> None:
    scorer = prepare_scorer(tiny_model("llama"))
    expected = scorer(batch).logprobs
    expected_gradients = gradients(scorer, expected)
    monkeypatch.setattr(scorer_module, "grid_padding", lambda length, like: 7)
    found = scorer(batch).logprobs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert_close(gradients(scorer, found), expected_gradients)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
@pytest.mark.parametrize("path", ["tree", "padded"])
def test_vocabulary_gradients_in_place_are_those_of_autograd(tiny_model, batch, family, path) -> None:
    """Tied or not, scaled embeddings or not: with layers that take part and with ones that don't."""
    scorer = prepare_scorer(tiny_model(family))
    scorer.path = path
    weights = torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(1))
    expected = gradients(scorer, scorer(batch).logprobs)
    named = dict(scorer.named_parameters())
    masters = MasterWeights(named.values(), vocabulary_layers(scorer))
    (scorer(batch).logprobs * weights).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in named.items() if parameter.grad is not None}
    masters.close()
    assert_close(found, expected)


def test_layers_of_the_vocabulary(tiny_model) -> None:
    scorer = prepare_scorer(tiny_model("llama"))
    model = scorer.model
    assert vocabulary_layers(scorer) == [model.get_input_embeddings(), model.lm_head]
    assert vocabulary_layers(model) == []
    with_head = prepare_scorer(with_lora(tiny_model("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert vocabulary_layers(with_head) == [with_head.model.get_base_model().get_input_embeddings()]
