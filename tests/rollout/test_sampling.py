"""Sampling against the distribution written out in float64.

A uniform number in the middle of a token's stretch of the cumulative distribution must pick that token. Asked for every
token, this pins the whole distribution, the order of the steps and the search, without chance.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trueup.rollout import sampling as module
from trueup.rollout.sampling import BLOCK, nucleus_bound, penalize, sample
from trueup.rollout.settings import SamplingParams

WAYS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
}


def exact(logits: np.ndarray, ways: SamplingParams, seen: np.ndarray | None = None) -> np.ndarray:
    """The distribution of one row of logits, token by token, in float64."""
    scores = logits.astype(np.float64).copy()
    for token in np.flatnonzero(seen) if seen is not None else []:
        penalty = ways.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scores /= ways.temperature
    p = np.exp(scores - scores.max())
    p /= p.sum()
    if ways.top_k:
        p[p < np.sort(p)[::-1][: ways.top_k][-1]] = 0
        p /= p.sum()
    if ways.top_p < 1:
        order = np.argsort(-p, kind="stable")
        crossing = np.flatnonzero(np.cumsum(p[order]) >= ways.top_p - 1e-12)[0]
        p[p < p[order[crossing]]] = 0
        p /= p.sum()
    if ways.min_p:
        p[p < ways.min_p * p.max()] = 0
        p /= p.sum()
    return p


@pytest.mark.parametrize("size", [2, BLOCK - 1, BLOCK, BLOCK + 1, 1000])
@pytest.mark.parametrize("way", WAYS)
def test_every_token_has_its_stretch(size, way) -> None:
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 2, size).astype(np.float32)
    seen = rng.random(size) < 0.3
    ways = SamplingParams(**WAYS[way])
    p = exact(logits, ways, seen)
    tokens = np.flatnonzero(p > 1e-5)
    assert (way in ("top_k", "top_p", "min_p", "all")) <= (len(tokens) < size or size == 2)
    middles = (np.cumsum(p) - p / 2)[tokens]
    rows = len(tokens)
    found = sample(
        torch.tensor(logits).expand(rows, -1),
        torch.tensor(middles),
        ways,
        seen=torch.tensor(seen).expand(rows, -1),
    )
    assert found.tokens.tolist() == tokens.tolist()
    np.testing.assert_allclose(found.sampler_logprobs, np.log(p[tokens]), atol=1e-5)
    own = torch.tensor(logits).double().log_softmax(-1)[tokens]
    np.testing.assert_allclose(found.untempered_logprobs, own, atol=1e-5)


def test_tokens_that_are_equally_likely_all_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    middles = torch.tensor([1 / 6, 1 / 2, 5 / 6])
    for ways in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}):
        assert sample(logits.expand(3, -1), middles, SamplingParams(**ways)).tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize("size", [7, 3 * BLOCK + 5, 150_000])
def test_the_ends_of_the_unit_interval_pick_tokens_with_weight(size) -> None:
    """Also where float32 sums are far from exact, and the first and last tokens and blocks have no weight."""
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    logits[:, : size // 3] = logits[:, -(size // 3) :] = -torch.inf
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    found = sample(logits.expand(2, -1), ends, SamplingParams())
    assert found.tokens.tolist() == [size // 3, size - size // 3 - 1]
    assert torch.isfinite(found.sampler_logprobs).all()


def test_many_numbers_give_the_distribution_of_a_large_vocabulary() -> None:
    """In halves: of 32,000 tokens in bfloat16 each half is drawn as often as it weighs, to a tenth of a per mille."""
    logits = torch.randn(1, 32_000, generator=torch.Generator().manual_seed(1)).bfloat16()
    u = (torch.arange(512, dtype=torch.float64) + 0.5) / 512
    tokens = sample(logits.expand(512, -1), u, SamplingParams()).tokens
    p = logits[0].double().softmax(-1).cumsum(-1)
    begins = torch.cat([torch.zeros(1, dtype=torch.float64), p])[tokens]
    assert bool(((begins - 1e-6 <= u) & (u <= p[tokens] + 1e-6)).all())


@pytest.mark.parametrize("way", WAYS)
def test_rows_do_not_depend_on_those_beside_them(monkeypatch, way) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, u = torch.randn(9, 700, generator=generator), torch.rand(9, generator=generator)
    seen = torch.rand(9, 700, generator=generator) < 0.5
    together = sample(logits, u, SamplingParams(**WAYS[way]), seen=seen)
    monkeypatch.setitem(module.CACHED, "cpu", 1)
    alone = sample(logits, u, SamplingParams(**WAYS[way]), seen=seen)
    assert torch.equal(together.tokens, alone.tokens)
    torch.testing.assert_close(together.sampler_logprobs, alone.sampler_logprobs, rtol=0, atol=1e-6)


def test_greedy_is_the_first_of_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 4.0]])
    found = sample(logits, torch.tensor([0.9, 0.9]), SamplingParams(temperature=0))
    assert found.tokens.tolist() == [1, 0]
    assert found.sampler_logprobs.tolist() == [0, 0]
    torch.testing.assert_close(found.untempered_logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])
    seen = torch.tensor([[False, True, False], [True, False, False]])
    penalized = sample(logits, torch.zeros(2), SamplingParams(temperature=0, repetition_penalty=3.0), seen=seen)
    assert penalized.tokens.tolist() == [2, 2]


def test_nothing_is_changed_that_was_given() -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(3))
    before = logits.clone()
    sample(logits, torch.rand(3), SamplingParams(**WAYS["all"]), seen=torch.ones(3, 200, dtype=torch.bool))
    assert torch.equal(logits, before)


def test_the_penalty_never_makes_a_token_likelier() -> None:
    logits = torch.tensor([[-2.0, 0.0, 2.0]])
    seen = torch.ones(1, 3, dtype=torch.bool)
    assert penalize(logits, seen, 2.0).tolist() == [[-4.0, 0.0, 1.0]]


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_the_nucleus_is_that_of_the_sorted_weights(spread, top_p) -> None:
    """Narrow ones are found among the most likely, wide ones by bisection."""
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(4)) * spread
    logits[3] = logits[3].round()  # ties
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    ordered = weights.double().sort(-1, descending=True).values
    shares = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True)
    crossing = (shares < top_p).sum(-1, keepdim=True)
    assert torch.equal(nucleus_bound(weights, top_p).double(), ordered.gather(-1, crossing))
