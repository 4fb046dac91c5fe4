"""NEFTune's noise: as large as the formula says, the same on tree and rows, and nowhere but in training."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from trueup.models.noise import embedding_noise, noisy_embeddings
from trueup.models.scorer import Scorer, prepare_scorer
from trueup.models.tree import TreeBatch, tree_batch

SHAPES = [(9, (8, 5, 11)), (1, (12,)), (6, (7, 2))]
ALPHA = 5.0


@pytest.fixture(scope="module")
def batch(make_groups) -> TreeBatch:
    return tree_batch(make_groups(SHAPES))


def logprobs(scorer: Scorer, batch: TreeBatch, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return scorer(batch).logprobs


def test_noise_is_uniform_within_the_bound_of_its_sequence(make_groups) -> None:
    """α/√(L·D): a longer sequence gets less on each token, and a shared prompt what its longest sequence gets."""
    batch = tree_batch(make_groups([(3, (2, 7)), (1, (1,))]))
    bound = ALPHA / (4096 * torch.tensor([10.0] * 3 + [5.0] * 2 + [10.0] * 7 + [2.0] * 2)).sqrt()
    torch.manual_seed(0)
    relative = embedding_noise(batch, 4096, ALPHA) / bound[:, None]
    assert relative.dtype == torch.float32
    assert relative.abs().max() <= 1
    assert (relative.abs().amax(-1) > 0.99).all()
    torch.testing.assert_close(relative.mean(-1), torch.zeros(14), rtol=0, atol=5 / 4096**0.5)
    torch.testing.assert_close(relative.square().mean(-1), torch.full((14,), 1 / 3), rtol=0, atol=5 * 0.3 / 4096**0.5)
    whole_sequence = (relative * bound[:, None])[:3].square().sum() + (relative * bound[:, None])[5:12].square().sum()
    assert whole_sequence.sqrt().item() == pytest.approx(ALPHA / 3**0.5, rel=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt"])
def test_scores_are_those_of_the_plain_model_on_noisy_embeddings(tiny_model, make_groups, family) -> None:
    """One demonstration: noise added by hand to what the embedding gives, then the model's own forward pass."""
    model = tiny_model(family)
    batch = tree_batch(make_groups([(4, (6,))]))
    scorer = prepare_scorer(model, neftune_alpha=ALPHA)
    assert scorer.path == "tree"
    scorer.train()
    model.eval()  # no dropout
    found = logprobs(scorer, batch)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        torch.manual_seed(0)
        dim = embedding(torch.tensor([0])).shape[-1]
        noise = embedding_noise(batch, dim, ALPHA)
        handle = embedding.register_forward_hook(lambda module, inputs, out: out + noise)
        logits = model(input_ids=batch.tokens[None], use_cache=False).logits[0]
        handle.remove()
        without = model(input_ids=batch.tokens[None], use_cache=False).logits[0]
    expected, quiet = (x[3:-1].log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0] for x in (logits, without))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    assert (expected - quiet).abs().max() > 0.01


def test_tree_and_padded_rows_read_the_same_noise(tiny_model, batch) -> None:
    model = tiny_model("llama")
    prepare_scorer(model)
    paths = [Scorer(model, "tree"), Scorer(model, "padded"), Scorer(model, "padded", own_head=True)]
    for scorer in paths:
        scorer.neftune_alpha = ALPHA
    on_tree, on_rows, by_own_head = (logprobs(scorer, batch) for scorer in paths)
    torch.testing.assert_close(on_rows, on_tree, rtol=0, atol=5e-5)
    torch.testing.assert_close(by_own_head, on_tree, rtol=0, atol=5e-5)
    assert (on_tree - logprobs(paths[0], batch, seed=1)).abs().max() > 0.01


def test_only_in_training_and_nothing_stays_behind(tiny_model, batch) -> None:
    model = tiny_model("llama")
    quiet = prepare_scorer(model)(batch).logprobs
    scorer = prepare_scorer(model, neftune_alpha=ALPHA)
    scorer.eval()
    state = torch.get_rng_state()
    assert torch.equal(scorer(batch).logprobs, quiet)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    scorer.train()
    assert (logprobs(scorer, batch) - quiet).abs().max() > 0.01
    assert not model.get_input_embeddings()._forward_hooks
    scorer.eval()
    assert torch.equal(scorer(batch).logprobs, quiet)


def test_the_hook_goes_when_the_forward_pass_fails(tiny_model, batch) -> None:
    model = tiny_model("llama")
    hooks = model.get_input_embeddings()._forward_hooks

    def fail() -> None:
        with noisy_embeddings(model, batch, "tree", ALPHA):
            assert len(hooks) == 1
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert not hooks


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
def test_with_lora_and_gradient_checkpointing_the_gradient_is_the_same(tiny_model, batch) -> None:
    """The embedding is read once, before the first checkpoint: nothing is drawn a second time in the backward pass."""
    model: Any = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scorer = prepare_scorer(model, neftune_alpha=ALPHA)
    scorer.train()
    expected = torch.autograd.grad(logprobs(scorer, batch).sum(), trained)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer.train()
    found = torch.autograd.grad(logprobs(scorer, batch).sum(), trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
