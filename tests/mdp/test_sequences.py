"""The enumerable language model: everything it can say, once, with probabilities that add up to 1."""

from __future__ import annotations

import pytest
import torch

from trueup.errors import DataError
from trueup.mdp import SequenceSpace


def test_golden() -> None:
    space = SequenceSpace(vocabulary_size=2, max_length=2, end_token=1)
    assert [row[m].tolist() for row, m in zip(space.tokens, space.mask, strict=True)] == [[1], [0, 0], [0, 1]]
    assert space.num_contexts == 2  # the empty prefix, and [0]
    assert [row[m].tolist() for row, m in zip(space.contexts, space.mask, strict=True)] == [[0], [0, 1], [0, 1]]
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64).log()
    torch.testing.assert_close(
        space.sequence_logprobs(logits).exp(), torch.tensor([0.75, 0.125, 0.125], dtype=torch.float64)
    )
    torch.testing.assert_close(space.token_logprobs(logits)[0], torch.tensor([0.75, 1.0], dtype=torch.float64).log())


@pytest.mark.parametrize(("size", "length", "end"), [(3, 3, None), (3, 3, 2), (2, 5, 0), (4, 1, 1), (1, 4, None)])
def test_everything_once(size: int, length: int, end: int | None) -> None:
    space = SequenceSpace(size, length, end)
    if end is None:
        assert len(space) == size**length
        assert space.num_contexts == sum(size**t for t in range(length))
    logits = torch.randn(space.num_contexts, size, dtype=torch.float64, requires_grad=True)
    logprobs = space.sequence_logprobs(logits)
    torch.testing.assert_close(logprobs.exp().sum(), torch.ones((), dtype=torch.float64))
    said = [tuple(row[m].tolist()) for row, m in zip(space.tokens, space.mask, strict=True)]
    assert len(set(said)) == len(space)
    assert all((seq[-1] == end or len(seq) == length) and end not in seq[:-1] for seq in said)
    # The same prefix is the same context, whatever follows; different prefixes are different ones.
    prefixes = {}
    for seq, contexts in zip(said, space.contexts.tolist(), strict=True):
        for t in range(len(seq)):
            assert prefixes.setdefault(contexts[t], seq[:t]) == seq[:t]
    assert len(set(prefixes.values())) == len(prefixes) == space.num_contexts
    assert torch.autograd.gradcheck(space.token_logprobs, logits)


def test_kl_is_the_mean_of_the_states_kl() -> None:
    """Chain rule: KL over sequences = Σ over states of how often they are visited × their own KL."""
    space = SequenceSpace(3, 3, end_token=0)
    logits, ref = torch.randn((2, space.num_contexts, 3), dtype=torch.float64)
    policy, other = torch.log_softmax(logits, -1), torch.log_softmax(ref, -1)
    per_state = (policy.exp() * (policy - other)).sum(-1)
    visited = torch.where(space.mask, per_state[space.contexts], 0.0).sum(-1)
    torch.testing.assert_close(space.kl(logits, ref), (space.sequence_logprobs(logits).exp() * visited).sum())
    torch.testing.assert_close(space.kl(logits, logits), torch.zeros((), dtype=torch.float64))


def test_refusals() -> None:
    with pytest.raises(DataError, match="length of 0"):
        SequenceSpace(3, 0)
    with pytest.raises(DataError, match="end token 3"):
        SequenceSpace(3, 2, 3)
    with pytest.raises(DataError, match=r"shape \(2, 3\), expected \(4, 3\)"):
        SequenceSpace(3, 2).token_logprobs(torch.zeros(2, 3))
