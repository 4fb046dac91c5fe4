"""The layout of the stream: positions, who sees whom, what is scored, and the way back to rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trueup.errors import DataError
from trueup.models.tree import tree_batch
from trueup.records import Completion, CompletionGroup

SHAPES = [(3, (2, 1)), (1, (4,)), (2, (1, 3, 2))]
shapes = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)), min_size=1, max_size=4
)


def test_a_batch_by_hand() -> None:
    masked = Completion(tokens=np.array([14, 15]), mask=np.array([True, False]))
    groups = [
        CompletionGroup(prompt=np.array([10, 11, 12]), completions=(Completion(tokens=np.array([13])), masked)),
        CompletionGroup(prompt=np.array([20]), completions=(Completion(tokens=np.array([21, 22, 23])),)),
    ]
    batch = tree_batch(groups)
    assert batch.tokens.tolist() == [10, 11, 12, 13, 14, 15, 20, 21, 22, 23]
    assert batch.positions.tolist() == [0, 1, 2, 3, 3, 4, 0, 1, 2, 3]
    assert batch.targets.tolist() == [13, 14, 21, 22, 23]  # 15 is somebody else's: no hidden state, no logits for it
    assert batch.scored.tolist() == [2, 2, 6, 7, 8]
    assert batch.places.tolist() == [0, 3, 6, 7, 8]
    assert batch.lengths.tolist() == [1, 2, 3]
    assert batch.last.tolist() == [3, 5, 9]
    assert batch.group_of.tolist() == [0, 0, 1]
    assert batch.num_groups == 2
    assert batch.sequence_lengths.tolist() == [5, 5, 5, 4, 5, 5, 4, 4, 4, 4]  # the prompt's: of the longer completion
    assert batch.rows(batch.targets).tolist() == [[13, 0, 0], [14, 0, 0], [21, 22, 23]]
    assert batch.row_mask.tolist() == [[True, False, False], [True, False, False], [True, True, True]]
    rows = batch.padded()
    assert rows.tokens.tolist() == [[10, 11, 12, 13, 0], [10, 11, 12, 14, 15], [20, 21, 22, 23, 0]]
    assert rows.attention_mask.sum(-1).tolist() == [4, 5, 4]
    assert rows.stream.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 4, 5], [6, 7, 8, 9, 0]]
    assert rows.scored.tolist() == [2, 7, 10, 11, 12]
    assert rows.last.tolist() == [3, 9, 13]


@given(shapes, st.none() | st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_token_sees_its_own_path_back_to_the_window(shape, window) -> None:
    """Against the meaning: the ancestors of a token are its completion up to itself and its prompt."""
    batch = tree_batch([_group(prompt, lengths) for prompt, lengths in shape])
    ancestors: list[list[int]] = []
    for prompt, lengths in shape:
        start = len(ancestors)
        ancestors += [list(range(start, start + i + 1)) for i in range(prompt)]
        for length in lengths:
            here = len(ancestors)
            ancestors += [[*range(start, start + prompt), *range(here, here + i + 1)] for i in range(length)]
    visible = batch.layout.mask(window)
    for query, path in enumerate(ancestors):
        assert visible[query].nonzero()[:, 0].tolist() == (path if window is None else path[-window:])
        assert batch.positions[query] == len(path) - 1


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_tree_and_padded_rows_score_the_same_tokens(shape) -> None:
    batch = tree_batch([_group(prompt, lengths, seed=i) for i, (prompt, lengths) in enumerate(shape)])
    rows = batch.padded()
    flat = rows.tokens.flatten()
    assert torch.equal(flat[rows.scored], batch.tokens[batch.scored])
    assert torch.equal(flat[rows.scored + 1], batch.targets)
    assert torch.equal(flat[rows.last], batch.tokens[batch.last])
    assert torch.equal(batch.rows(batch.targets)[batch.row_mask], batch.targets)
    assert int(batch.lengths.sum()) == len(batch.targets)


def test_only_what_the_model_wrote_is_scored() -> None:
    """A conversation with somebody else's turns in between: scored tokens keep their places, in tree and rows alike."""
    mask = np.array([False, True, True, False, False, True])
    tokens = np.arange(30, 36)
    groups = [
        CompletionGroup(prompt=np.array([7, 8]), completions=(Completion(tokens=tokens, mask=mask),)),
        _group(3, (2, 4)),
        CompletionGroup(prompt=np.array([9]), completions=(Completion(tokens=tokens[:2], mask=mask[:1].repeat(2)),)),
    ]
    batch = tree_batch(groups)
    rows, flat = batch.padded(), batch.padded().tokens.flatten()
    assert batch.targets[:3].tolist() == [31, 32, 35]
    assert batch.scored[:3].tolist() == [2, 3, 6]
    assert batch.row_mask.tolist()[0] == mask.tolist()
    assert not batch.row_mask[-1].any()
    assert torch.equal(flat[rows.scored + 1], batch.targets)
    assert torch.equal(flat[rows.scored], batch.tokens[batch.scored])


def test_rows_hand_the_gradient_back_in_place() -> None:
    batch = tree_batch([_group(prompt, lengths) for prompt, lengths in SHAPES])
    flat = torch.arange(1.0, len(batch.targets) + 1, requires_grad=True)
    rows = batch.rows(flat)
    weights = torch.arange(float(rows.numel())).view(rows.shape)
    (rows * weights).sum().backward()
    assert flat.grad is not None
    assert torch.equal(flat.grad, weights[batch.row_mask])
    assert not rows[~batch.row_mask].any()


def test_order_of_groups_moves_completions_and_nothing_else() -> None:
    groups = [_group(prompt, lengths, seed=i) for i, (prompt, lengths) in enumerate(SHAPES)]
    for order in itertools.permutations(range(3)):
        batch = tree_batch([groups[i] for i in order])
        targets = [completion.tokens for i in order for completion in groups[i].completions]
        assert batch.targets.tolist() == np.concatenate(targets).tolist()


@pytest.mark.parametrize(("prompt", "lengths"), [(0, (1,)), (2, ()), (2, (1, 0))])
def test_nothing_to_score_or_to_score_from_is_an_error(prompt, lengths) -> None:
    with pytest.raises(DataError, match=r"pairs.jsonl:7"):
        tree_batch([_group(prompt, lengths, where="pairs.jsonl:7")])


def test_no_groups_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one group"):
        tree_batch([])


def _group(prompt: int, lengths: tuple[int, ...], *, seed: int = 0, where: str = "") -> CompletionGroup:
    rng = np.random.default_rng(seed)
    completions = tuple(Completion(tokens=rng.integers(1, 100, n)) for n in lengths)
    return CompletionGroup(prompt=rng.integers(1, 100, prompt), completions=completions, where=where)
