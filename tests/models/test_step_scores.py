"""Scores at the ends of steps: tree = padded rows = the plain forward pass on what stands before each end."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from trueup.models import attention
from trueup.models.scorer import RewardScorer, prepare_reward_scorer
from trueup.models.tree import TreeBatch, tree_batch
from trueup.records import Completion, CompletionGroup

STEPS = [[[2, 4, 7], [4], [0, 10]], [[11]], [[0, 1, 2, 3, 4, 5, 6], [0, 1]]]


@pytest.fixture(scope="module")
def batch(make_groups) -> TreeBatch:
    groups = make_groups([(9, (8, 5, 11)), (1, (12,)), (6, (7, 2))])
    return tree_batch([with_steps(group, ends) for group, ends in zip(groups, STEPS, strict=True)])


def with_steps(group: CompletionGroup, ends: list[list[int]]) -> CompletionGroup:
    completions = [
        dataclasses.replace(completion, step_ends=np.array(each))
        for completion, each in zip(group.completions, ends, strict=True)
    ]
    return dataclasses.replace(group, completions=tuple(completions))


def plain_scores(model: Any, batch: TreeBatch) -> torch.Tensor:
    """transformers' own score of the prompt and the completion up to each step's end, alone, eager attention: [M]."""
    implementation, model.config._attn_implementation = model.config._attn_implementation, "eager"
    rows, row, scores = batch.padded().tokens, 0, []
    for span, group in zip(batch.layout.spans, STEPS, strict=True):
        for ends in group:
            cut = [rows[row, : span.prompt + end + 1] for end in ends]
            scores += [model(input_ids=tokens[None]).logits[0, 0] for tokens in cut]
            row += 1
    model.config._attn_implementation = implementation
    return torch.stack(scores)


def process_model(tiny_model, family: str) -> Any:
    model = tiny_model(family, num_labels=1)
    model.config.scores_each = "step"
    return model


def assert_same(model: Any, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    mine, true = (torch.autograd.grad((x * weights).sum(), parameters) for x in (found, expected))
    for name, a, b in zip(names, mine, true, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max())), name


def test_the_ends_of_steps_by_hand() -> None:
    tokens = np.array([21, 22, 23])
    groups = [
        CompletionGroup(
            prompt=np.array([10, 11]),
            completions=(Completion(tokens=tokens, step_ends=np.array([0, 2])), Completion(tokens=tokens)),
        ),
        CompletionGroup(prompt=np.array([30]), completions=(Completion(tokens=tokens[:2], step_ends=np.array([1])),)),
    ]
    batch = tree_batch(groups)
    assert batch.step_ends.tolist() == [2, 4, 10]  # the second completion is not divided into steps
    assert batch.tokens[batch.step_ends].tolist() == [21, 23, 22]
    rows = batch.padded()
    assert rows.step_ends.tolist() == [2, 4, 12]
    assert rows.tokens.flatten()[rows.step_ends].tolist() == [21, 23, 22]
    assert tree_batch([dataclasses.replace(groups[0], completions=groups[0].completions[1:])]).step_ends.tolist() == []


def test_rows_and_stream_name_the_same_tokens(batch) -> None:
    rows = batch.padded()
    assert torch.equal(rows.tokens.flatten()[rows.step_ends], batch.tokens[batch.step_ends])
    assert len(batch.step_ends) == sum(len(ends) for group in STEPS for ends in group)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_tree_is_the_plain_forward_pass_at_every_step(tiny_model, batch, family) -> None:
    model = process_model(tiny_model, family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scorer = prepare_reward_scorer(model)
    assert (scorer.path, scorer.where) == ("tree", "step_ends")
    assert_same(model, scorer(batch), plain_scores(model, batch))
    model.config._attn_implementation = "sdpa"
    assert_same(model, RewardScorer(model, "padded", where="step_ends")(batch), plain_scores(model, batch))


def test_a_model_that_can_t_use_the_tree_scores_the_same_on_rows(tiny_model, batch) -> None:
    model = process_model(tiny_model, "gptj")
    with pytest.warns(UserWarning, match="can't use the tree batch"):
        scorer = prepare_reward_scorer(model)
    assert scorer.path == "padded"
    assert_same(model, scorer(batch), plain_scores(model, batch))


def test_the_check_looks_at_the_ends_of_steps(tiny_model, monkeypatch) -> None:
    """A seam that is right at the last tokens of completions only passes for outcomes, and must not for steps."""
    whole = attention.tree_attention

    def right_at_the_end(query: Any, key: Any, value: Any, layout: Any, **options: Any) -> torch.Tensor:
        last = torch.tensor([branch.stop - 1 for span in layout.spans for branch in span.branches])
        wrong = torch.full((len(layout.group), 1), 0.5).index_fill(0, last, 1.0)
        return wrong * whole(query, key, value, layout, **options)

    monkeypatch.setattr(attention, "tree_attention", right_at_the_end)
    model = tiny_model("llama", num_labels=1, num_hidden_layers=1)
    assert prepare_reward_scorer(model).path == "tree"
    model.config.scores_each = "step"
    with pytest.warns(UserWarning, match="scores are off"):
        assert prepare_reward_scorer(model).path == "padded"
