"""Tree batch = plain forward pass, log-probs and parameter gradients, for every architecture that is promised.

Lengths are mixed and, where there is a sliding window, longer than it. The gradients are of the real path: backbone,
gather, fused head. What can't use the tree must be caught by the check at load, and give the same on padded rows.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from trueup.models import attention
from trueup.models.attention import TREE_ATTENTION
from trueup.models.precision import round_parameters
from trueup.models.scorer import prepare_reward_scorer, prepare_scorer
from trueup.models.tree import TreeBatch, tree_batch

ON_THE_TREE = [
    *("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2", "smollm3", "gpt_neox", "gpt2", "granite"),
    *("cohere", "starcoder2", "opt", "qwen3_moe", "gemma2", "gpt_oss", "phi"),
]
ON_PADDED_ROWS = {
    "lfm2": "scores are off",  # short convolutions run over the stream
    "qwen3_next": "scores are off",  # a linear recurrence, the same
    "falcon_h1": "scores are off",  # state space beside attention
    "bamba": "scores are off",  # state space in some layers
    "bloom": "ValueError",  # biases by distance, made from a two-dimensional mask
    "mpt": "scores are off",  # biases by distance, attention of its own
    "falcon": "scores are off",  # attention of its own
    "gptj": "scores are off",  # attention of its own
}
CHOOSING = ("qwen3_moe", "gpt_oss", "qwen3_next")  # among experts
REAL_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
SHAPES = [(9, (8, 5, 11)), (1, (12,)), (6, (7, 2))]


@pytest.fixture(scope="module")
def batch(make_groups) -> TreeBatch:
    return tree_batch(make_groups(SHAPES))


def assert_same(model: Any, batch: TreeBatch, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Values, and the gradients of a random weighting of them: each parameter's to 1e-4 of its largest, or of 1."""
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    mine = torch.autograd.grad((found * weights).sum(), parameters, allow_unused=True)
    true = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    for name, a, b in zip(names, mine, true, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max())), name
    assert sum(float(b.abs().max()) > 1e-3 for b in true if b is not None) > len(names) / 2


@pytest.mark.parametrize("family", ON_THE_TREE)
def test_tree_is_the_plain_forward_pass(tiny_model, plain_logprobs, batch, family) -> None:
    model = tiny_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scorer = prepare_scorer(model)
    assert scorer.path == "tree"
    assert model.config._attn_implementation == TREE_ATTENTION
    assert_same(model, batch, scorer(batch).logprobs, plain_logprobs(model, batch))


@pytest.mark.parametrize("family", ON_PADDED_ROWS)
def test_the_check_catches_what_the_tree_would_get_wrong(tiny_model, plain_logprobs, batch, family) -> None:
    model = tiny_model(family)
    own = model.config._attn_implementation
    with pytest.warns(UserWarning, match=f"can't use the tree batch .*{ON_PADDED_ROWS[family]}") as caught:
        scorer = prepare_scorer(model)
    assert len([warning for warning in caught if "tree batch" in str(warning.message)]) == 1
    assert scorer.path == "padded"
    assert not scorer.own_head
    assert model.config._attn_implementation == own
    assert_same(model, batch, scorer(batch).logprobs, plain_logprobs(model, batch))


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1", "gptj"])
def test_the_check_catches_fresh_weights_too(tiny_model, family) -> None:
    """As initialised, what runs outside attention is almost 0: in lfm2, 7e-6 of a log-prob."""
    with pytest.warns(UserWarning, match="can't use the tree batch"):
        assert prepare_scorer(tiny_model(family, fresh=True)).path == "padded"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2", "opt", "qwen3_moe", "gpt_neox"])
def test_reward_model_on_the_tree(tiny_model, batch, family) -> None:
    model = tiny_model(family, num_labels=1)
    scorer = prepare_reward_scorer(model)
    assert scorer.path == "tree"
    assert_same(model, batch, scorer(batch), _plain_scores(model, batch))


@pytest.mark.parametrize("family", ["gptj", "falcon"])
def test_reward_model_on_padded_rows(tiny_model, batch, family) -> None:
    model = tiny_model(family, num_labels=1)
    with pytest.warns(UserWarning, match="can't use the tree batch"):
        scorer = prepare_reward_scorer(model)
    assert scorer.path == "padded"
    assert_same(model, batch, scorer(batch), _plain_scores(model, batch))


@pytest.mark.parametrize("family", [*ON_THE_TREE, *ON_PADDED_ROWS])
def test_a_bfloat16_model_has_its_residual_stream_in_float32(tiny_model, batch, family) -> None:
    """Forward and backward, on the tree or on padded rows; experts chosen otherwise after rounding make the bound."""
    model, truth = tiny_model(family, seed=1), tiny_model(family, seed=1)
    round_parameters(model, torch.bfloat16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for exact, value in zip(truth.parameters(), model.parameters(), strict=True):
            exact.copy_(value)
        scorer, expected = prepare_scorer(model), prepare_scorer(truth)(batch).logprobs
    assert scorer.float32_residual
    logprobs = scorer(batch).logprobs
    assert 1e-5 < (logprobs - expected).square().mean().sqrt() < (0.2 if family in CHOOSING else 0.05)
    logprobs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def _plain_scores(model: Any, batch: TreeBatch) -> torch.Tensor:
    """transformers' own sequence classification of each completion alone, eager attention: [C]."""
    implementation, model.config._attn_implementation = model.config._attn_implementation, "eager"
    rows = batch.padded()
    lengths = rows.attention_mask.sum(-1).tolist()
    scores = [model(input_ids=tokens[None, :n]).logits[0, 0] for tokens, n in zip(rows.tokens, lengths, strict=True)]
    model.config._attn_implementation = implementation
    return torch.stack(scores)


# --- the check itself: a seam broken on purpose must not pass


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("family", "broken"),
    [
        ("mistral", {"window": None}),
        ("qwen2", {"window": None}),
        ("gemma3_text", {"window": None}),
        ("mistral", {"window": 5}),  # one token too wide: the check runs at 4
        ("gemma2", {"softcap": None}),  # 50 in real models, which scores hardly reach: the check runs at 1
        ("gpt_oss", {"sinks": None}),
        ("granite", {"scaling": 8**-0.5}),
    ],
)
def test_the_check_catches_a_lost_keyword(tiny_model, monkeypatch, family, broken, fresh) -> None:
    whole = attention.tree_attention
    monkeypatch.setattr(attention, "tree_attention", lambda *args, **options: whole(*args, **(options | broken)))
    with pytest.warns(UserWarning, match="scores are off"):
        scorer = prepare_scorer(tiny_model(family, fresh=fresh, **REAL_CAPS if family == "gemma2" else {}))
    assert scorer.path == "padded"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_check_catches_wrong_positions(tiny_model, monkeypatch, family) -> None:
    model = tiny_model(family)
    backbone = type(model.base_model)
    forward = backbone.forward

    def counting_on(self: Any, *args: Any, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The stream's own numbering in place of each completion's."""
        if position_ids is not None:
            position_ids = torch.arange(position_ids.shape[1])[None]
        return forward(self, *args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(backbone, "forward", counting_on)
    with pytest.warns(UserWarning, match="scores are off"):
        assert prepare_scorer(model).path == "padded"


@pytest.mark.parametrize("hidden", ["siblings", "prompt"])
def test_the_check_catches_a_wrong_layout(tiny_model, monkeypatch, hidden) -> None:
    """Completions that see their siblings, or that miss their prompt."""

    def mask(layout: Any, window: int | None = None, queries: slice = slice(None), keys: slice = slice(None)) -> Any:
        index = torch.arange(len(layout.group))
        q, k = index[queries][:, None], index[keys][None, :]
        seen = (layout.group[q] == layout.group[k]) & (layout.positions[q] >= layout.positions[k])
        return seen if hidden == "siblings" else layout.visible(q, k) & (layout.branch[q] == layout.branch[k])

    monkeypatch.setattr("trueup.models.tree.TreeLayout.mask", mask)
    with pytest.warns(UserWarning, match="scores are off"):
        assert prepare_scorer(tiny_model("llama")).path == "padded"
