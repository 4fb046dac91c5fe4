"""Every kernel against plain attention under the predicate, and the seam without a layout against transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from trueup.models import attention
from trueup.models.attention import (
    attention_by_parts,
    attention_forward,
    attention_parts,
    dense_attention,
    dense_tree_attention,
    flex_tree_attention,
    tree_attention,
)
from trueup.models.tree import TreeBatch, tree_batch

SHAPES = [(9, (8, 5, 11)), (1, (12,)), (6, (7, 2)), (3, (1, 1)), (2, (14, 9)), (70, (3,)), (80, (2, 3))]
WINDOWS = [None, 1, 2, 3, 5, 8, 15, 66]
ALWAYS_APART, ALWAYS_TOGETHER = 0, 10**9


@pytest.fixture(scope="module")
def batch(make_groups) -> TreeBatch:
    return tree_batch(make_groups(SHAPES))


def tensors(batch: TreeBatch, *, heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, key_heads, key_heads)
    return [
        torch.randn(1, len(batch.tokens), n, 8, dtype=dtype, generator=generator).transpose(1, 2).requires_grad_()
        for n in sizes
    ]


@pytest.mark.parametrize("call_cost", [ALWAYS_APART, attention.CALL_COST, ALWAYS_TOGETHER])
@pytest.mark.parametrize("window", WINDOWS)
def test_parts_hold_every_visible_pair_exactly_once(make_groups, monkeypatch, window, call_cost) -> None:
    monkeypatch.setattr(attention, "CALL_COST", call_cost)
    batch = tree_batch(make_groups(SHAPES))
    count = torch.zeros(len(batch.tokens), len(batch.tokens), dtype=torch.int64)
    written = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for part in attention_parts(batch.layout, window, torch.float64):
        block = torch.ones(count[part.queries, part.keys].shape, dtype=torch.bool)
        if part.causal:
            block = block.tril()
        if part.bias is not None:
            block &= part.bias == 0
        count[part.queries, part.keys] += block
        on_top = part.keys.stop <= part.queries.start
        assert bool(written[part.queries].all() if on_top else not written[part.queries].any())
        written[part.queries] = True
    assert torch.equal(count, batch.layout.mask(window).long())


@pytest.mark.parametrize("call_cost", [ALWAYS_APART, ALWAYS_TOGETHER])
@pytest.mark.parametrize("window", WINDOWS)
def test_parts_give_the_dense_output_and_gradient(make_groups, monkeypatch, window, call_cost) -> None:
    monkeypatch.setattr(attention, "CALL_COST", call_cost)
    batch = tree_batch(make_groups(SHAPES))
    inputs = tensors(batch)
    found = attention_by_parts(*inputs, batch.layout, scaling=0.4, window=window)
    expected = dense_attention(*inputs, batch.layout.mask(window), scaling=0.4)
    weights = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for mine, true in zip(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("call_cost", [ALWAYS_APART, ALWAYS_TOGETHER])
def test_parts_pass_finite_differences(make_groups, monkeypatch, call_cost) -> None:
    monkeypatch.setattr(attention, "CALL_COST", call_cost)
    batch = tree_batch(make_groups([(3, (2, 3)), (1, (2,))]))
    inputs = tensors(batch, heads=2, key_heads=1)
    assert torch.autograd.gradcheck(
        lambda *qkv: attention_by_parts(*qkv, batch.layout, scaling=0.5, window=3), inputs, fast_mode=True
    )


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"window": 4}, {"softcap": 0.7, "window": 2, "sinks": True}])
def test_dense_by_groups_is_dense_over_the_stream(batch, options) -> None:
    inputs = tensors(batch)
    if options.pop("sinks", False):
        options = options | {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)}
    whole = {name: value for name, value in options.items() if name != "window"}
    expected = dense_attention(*inputs, batch.layout.mask(options.get("window")), scaling=0.4, **whole)
    found = dense_tree_attention(*inputs, batch.layout, scaling=0.4, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_dense_attention_by_its_formula(batch) -> None:
    """One head and query at a time: soft-cap before softmax, a sink that takes weight and gives nothing."""
    query, key, value = (x.detach()[0] for x in tensors(batch))
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    mask = batch.layout.mask(6)
    found = dense_attention(query[None], key[None], value[None], mask, scaling=0.4, softcap=1.2, sinks=sinks)[0]
    for head in range(4):
        for i in (0, 7, 20, len(mask) - 1):
            seen = mask[i].nonzero()[:, 0]
            scores = 1.2 * torch.tanh(0.4 * (key[head // 2, seen] @ query[head, i]) / 1.2)
            weights = scores.exp() / (scores.exp().sum() + sinks[head].exp())
            torch.testing.assert_close(found[head, i], weights @ value[head // 2, seen], rtol=0, atol=1e-12)


def test_dropout_keeps_the_mean(batch) -> None:
    """With values of one, every output is the sum of its weights: 1 on average, and 0 or more each time."""
    query, key, value = (x.detach() for x in tensors(batch, dtype=torch.float32))
    torch.manual_seed(0)
    ones = torch.ones_like(value)
    outputs = torch.stack(
        [tree_attention(query, key, ones, batch.layout, scaling=0.4, dropout=0.3) for _ in range(200)]
    )
    assert outputs.std() > 0.1
    torch.testing.assert_close(outputs.mean(), torch.tensor(1.0), rtol=0, atol=0.01)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 1.5), (3, 0.8)])
def test_flex_attention_over_the_predicate(batch, monkeypatch, window, softcap) -> None:
    """CUDA's kernel, run uncompiled on the CPU."""
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
    inputs = [x.detach().float() for x in tensors(batch)]
    batch.layout.kept.clear()
    found = flex_tree_attention(*inputs, batch.layout, scaling=0.4, window=window, softcap=softcap)
    expected = dense_attention(*inputs, batch.layout.mask(window), scaling=0.4, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("native", [False, True])
def test_half_precision_rounds_inputs_and_results(batch, monkeypatch, native) -> None:
    """On a CPU without products for it, only the inputs and the result are rounded, to 2^-9 of their size. With them,
    the weights are too, and what the backward pass starts from is the rounded output."""
    monkeypatch.setattr(attention, "cpu_multiplies", lambda dtype: native)
    half = [x.detach().bfloat16().requires_grad_() for x in tensors(batch)]
    wide = [x.detach().float().requires_grad_() for x in half]
    found = attention_by_parts(*half, batch.layout, scaling=0.4)
    expected = attention_by_parts(*wide, batch.layout, scaling=0.4)
    assert found.dtype == torch.bfloat16
    if not native:
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=0)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    pairs = [(found, expected)]
    grads = torch.autograd.grad(found, half, weights), torch.autograd.grad(expected, wide, weights.float())
    pairs += zip(*grads, strict=True)
    for mine, true in pairs:
        assert (mine.float() - true).norm() < 2**-8 * true.norm()


@pytest.mark.parametrize("kernel", [attention_by_parts, dense_tree_attention])
def test_padding_behind_the_stream_changes_nothing(batch, kernel) -> None:
    """It sees nothing, nothing sees it, and whatever stands there, no gradient comes of it."""
    inputs, length = tensors(batch), len(batch.tokens)
    padded = [torch.cat([x, torch.full_like(x[:, :, :5], 1e3)], 2).detach().requires_grad_() for x in inputs]
    found, expected = (kernel(*each, batch.layout, scaling=0.4) for each in (padded, inputs))
    torch.testing.assert_close(found[:, :, :length], expected, rtol=0, atol=0)
    assert not found[:, :, length:].any()
    grads = torch.autograd.grad(found.sum(), padded), torch.autograd.grad(expected.sum(), inputs)
    for mine, true in zip(*grads, strict=True):
        torch.testing.assert_close(mine[:, :, :length], true, rtol=0, atol=0)
        assert not mine[:, :, length:].any()


def test_gradient_is_the_same_to_the_bit_on_two_threads(batch) -> None:
    inputs = tensors(batch, dtype=torch.float32)
    weights = torch.randn(1, 4, len(batch.tokens), 8, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [
            torch.autograd.grad(attention_by_parts(*inputs, batch.layout, scaling=0.4), inputs, weights)
            for _ in range(5)
        ]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_tensors_of_another_length_are_refused(batch) -> None:
    query, key, value = (x[:, :, :-1] for x in tensors(batch))
    with pytest.raises(ValueError, match="tokens in the layout"):
        tree_attention(query, key, value, batch.layout, scaling=1.0)


def test_a_position_bias_is_refused(batch) -> None:
    query, key, value = tensors(batch)
    with pytest.raises(ValueError, match="position bias"):
        attention_forward(torch.nn.Module(), query, key, value, None, layout=batch.layout, position_bias=query)


def test_without_a_layout_soft_cap_and_sinks_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3))
    sinks = torch.tensor([0.5, 0.0, -1.0, 1.0])
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for mask in (None, causal[None, None]):
        found, _ = attention_forward(torch.nn.Module(), query, key, value, mask, scaling=0.4, softcap=1.0, s_aux=sinks)
        expected = dense_attention(query, key, value, causal, scaling=0.4, softcap=1.0, sinks=sinks)
        torch.testing.assert_close(found, expected.transpose(1, 2))
    # one query behind five cached keys sees all of them
    last, _ = attention_forward(torch.nn.Module(), query[:, :, -1:], key, value, None, scaling=0.4, softcap=1.0)
    full, _ = attention_forward(torch.nn.Module(), query, key, value, None, scaling=0.4, softcap=1.0)
    torch.testing.assert_close(last, full[:, -1:])
