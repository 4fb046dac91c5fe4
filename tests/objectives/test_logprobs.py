"""Log-probabilities and their kin: against the plain computation over all logits, values and gradients alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trueup.objectives import logprobs as logprobs_module
from trueup.objectives.logprobs import (
    TokenStatistics,
    entropy,
    label_smoothed_nll,
    linear_logprobs,
    log_collision,
    sequence_logprobs,
    token_logprobs,
    token_statistics,
    vocab_mean_logprobs,
)

ALL = TokenStatistics._fields[1:]
WANTS = [(), ("entropy",), ("vocab_mean_logprobs",), ("log_collision",), ALL]
SMALL_TILES = {"chunk_size": 3, "vocab_chunk_size": 7}
"""Divide neither 10 tokens nor 23 entries."""


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]


def head(num_tokens: int = 10, dim: int = 6, vocab: int = 23, *, dtype: torch.dtype = torch.float64) -> Head:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((num_tokens, dim), (vocab, dim), (vocab,))
    )
    return Head(hidden, weight, bias, torch.randint(vocab, (num_tokens,), generator=generator))


def materialized(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    want: Collection[str] = ALL,
) -> TokenStatistics:
    """The definition, through all logits in float64."""
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = (logits / temperature).log_softmax(-1)
    found = {
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
        "vocab_mean_logprobs": logprobs.mean(-1),
        "log_collision": logprobs.detach().exp().square().sum(-1).log(),
    }
    return TokenStatistics(logprobs[torch.arange(len(targets)), targets], **{name: found[name] for name in want})


def pull(found: TokenStatistics) -> Tensor:
    """A scalar that weighs every result differently, so that no two gradients are alike."""
    weights = torch.linspace(-1, 2, len(found.logprobs), dtype=torch.float64)
    total = (weights * found.logprobs).sum()
    if found.entropy is not None:
        total = total + (weights.flip(0).square() * found.entropy).sum()
    if found.vocab_mean_logprobs is not None:
        total = total + ((weights - 0.3).square() * found.vocab_mean_logprobs).sum()
    return total


def assert_close(found: TokenStatistics, expected: TokenStatistics, *, rtol: float, atol: float) -> None:
    for name, value, true in zip(TokenStatistics._fields, found, expected, strict=True):
        assert (value is None) == (true is None), name
        if value is not None and true is not None:
            message = partial("{}: {}".format, name)
            torch.testing.assert_close(value.double(), true.double(), rtol=rtol, atol=atol, msg=message)


# --- token, entropy, sequence ------------------------------------------------------------------------------------


def test_token_goldens() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    targets = torch.tensor([2, 0])
    assert token_logprobs(logits, targets).exp().tolist() == pytest.approx([4 / 7, 1 / 3])
    # temperature 1/2 squares the odds: 1, 4, 16
    assert token_logprobs(logits, targets, temperature=0.5).exp().tolist() == pytest.approx([16 / 21, 1 / 3])
    assert token_logprobs(2 * logits, targets, temperature=2.0).exp().tolist() == pytest.approx([4 / 7, 1 / 3])
    assert entropy(logits)[1].item() == pytest.approx(math.log(3))
    expected = -sum(p / 7 * math.log(p / 7) for p in (1, 2, 4))
    assert entropy(logits)[0].item() == pytest.approx(expected)
    assert entropy(logits, temperature=1e-3)[0].item() == pytest.approx(0, abs=1e-12)
    assert vocab_mean_logprobs(logits).exp().tolist() == pytest.approx([2 / 7, 1 / 3])  # the geometric mean of 1, 2, 4
    assert log_collision(logits).exp().tolist() == pytest.approx([(1 + 4 + 16) / 49, 1 / 3])
    assert vocab_mean_logprobs(logits, temperature=0.5)[0].exp().item() == pytest.approx(4 / 21)
    assert log_collision(logits, temperature=0.5)[0].exp().item() == pytest.approx((1 + 16 + 256) / 21**2)


def test_gradients_by_finite_differences() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, targets, temperature=0.7), (logits,))
    assert torch.autograd.gradcheck(lambda z: entropy(z, temperature=0.7), (logits,))
    assert torch.autograd.gradcheck(lambda z: vocab_mean_logprobs(z, temperature=0.7), (logits,))


def test_no_gradient_flows_through_the_collision() -> None:
    h = head()
    assert not log_collision(h.hidden).requires_grad
    found = linear_logprobs(h.hidden, h.weight, h.targets, want=["log_collision"])
    assert found.logprobs.requires_grad
    assert found.log_collision is not None
    assert not found.log_collision.requires_grad


def test_a_collision_is_two_draws_that_are_the_same() -> None:
    """Over all pairs of draws, and between the bounds that entropy sets: H₂ ≤ H ≤ log V."""
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    probs = logits.softmax(-1)
    pairs = probs[:, :, None] * probs[:, None, :]
    torch.testing.assert_close(log_collision(logits).exp(), pairs.diagonal(dim1=1, dim2=2).sum(-1))
    assert (-log_collision(logits) <= entropy(logits)).all()
    assert (entropy(logits) <= math.log(7)).all()


def test_statistics_are_the_functions_by_name() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    assert token_statistics(logits, targets).entropy is None
    found = token_statistics(logits, targets, temperature=0.7, want=ALL)
    assert torch.equal(found.logprobs, token_logprobs(logits, targets, temperature=0.7))
    for name, function in (
        ("entropy", entropy),
        ("vocab_mean_logprobs", vocab_mean_logprobs),
        ("log_collision", log_collision),
    ):
        assert torch.equal(getattr(found, name), function(logits, temperature=0.7))


# --- label smoothing ---------------------------------------------------------------------------------------------


def smoothed(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    found = token_statistics(logits, targets, want=["vocab_mean_logprobs"])
    assert found.vocab_mean_logprobs is not None
    return label_smoothed_nll(found.logprobs, found.vocab_mean_logprobs, label_smoothing=label_smoothing)


def test_label_smoothing_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64).log()
    target = torch.tensor([2])
    assert smoothed(logits, target, 0.0).item() == pytest.approx(math.log(7 / 4))
    assert smoothed(logits, target, 0.25).item() == pytest.approx(0.75 * math.log(7 / 4) + 0.25 * math.log(7 / 2))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_the_expectation_over_labels_and_torch_s(label_smoothing: float) -> None:
    """The label is the target with 1 − ε, and otherwise any entry: all of them enumerated."""
    logits = torch.randn(4, 6, dtype=torch.float64)
    targets = torch.tensor([0, 5, 2, 2])
    labels = torch.full((4, 6), label_smoothing / 6, dtype=torch.float64)
    labels[torch.arange(4), targets] += 1 - label_smoothing
    found = smoothed(logits, targets, label_smoothing)
    torch.testing.assert_close(found, -(labels * logits.log_softmax(-1)).sum(-1))
    peer = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    torch.testing.assert_close(found, peer)


def test_label_smoothing_s_minimiser() -> None:
    """1 − ε + ε/V on the target, ε/V elsewhere: there the gradient is 0, and nothing lies lower."""
    optimum = torch.tensor([[0.2 / 4, 0.2 / 4, 0.8 + 0.2 / 4, 0.2 / 4]], dtype=torch.float64).log().requires_grad_()
    target = torch.tensor([2])
    least = smoothed(optimum, target, 0.2).sum()
    (gradient,) = torch.autograd.grad(least, optimum)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    assert smoothed(optimum.detach() + 0.1 * torch.randn(50, 4, dtype=torch.float64), target.expand(50), 0.2).min() > (
        least.item()
    )


def test_label_smoothing_out_of_range_is_named() -> None:
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="label_smoothing must be at least 0 and below 1"):
            label_smoothed_nll(torch.zeros(2), torch.zeros(2), label_smoothing=wrong)


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    logits = torch.randn(7, dtype=torch.float64).expand(7, 7)
    assert token_logprobs(logits, torch.arange(7)).exp().sum().item() == pytest.approx(1, rel=1e-14)


def test_half_precision_logits_are_raised() -> None:
    logits = torch.randn(4, 100).bfloat16()
    targets = torch.arange(4)
    assert torch.equal(token_logprobs(logits, targets), token_logprobs(logits.float(), targets))
    for function in (entropy, vocab_mean_logprobs, log_collision):
        assert function(logits).dtype == torch.float32


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert token_logprobs(logits, torch.tensor([0])).item() == 0
    assert token_logprobs(logits, torch.tensor([1])).item() == -2e4
    assert entropy(logits).item() == 0
    assert vocab_mean_logprobs(logits).item() == -1e4
    assert log_collision(logits).item() == 0


def test_sequence_is_the_sum_of_what_the_mask_selects() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, math.nan, -math.inf]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    totals = sequence_logprobs(logprobs, mask)
    assert totals.tolist() == [-7, -8]
    (gradient,) = torch.autograd.grad(totals.sum(), logprobs)
    assert gradient.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert sequence_logprobs(logprobs[:, :0], mask[:, :0]).tolist() == [0, 0]


# --- the fused head ----------------------------------------------------------------------------------------------

OPTIONS = list(itertools.product((1.0, 0.3), (None, 2.0), (1.0, 0.7), (False, True)))


@pytest.mark.parametrize("tiles", [{}, SMALL_TILES], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("want", WANTS, ids=lambda want: ",".join(want) or "nothing")
@pytest.mark.parametrize(("scale", "softcap", "temperature", "with_bias"), OPTIONS)
def test_values_and_gradients_are_those_of_all_logits(
    scale: float,
    softcap: float | None,
    temperature: float,
    with_bias: bool,
    want: tuple[str, ...],
    tiles: dict[str, int],
) -> None:
    h = head()
    inputs = h.inputs if with_bias else h.inputs[:2]
    transform: dict[str, Any] = {"scale": scale, "softcap": softcap, "temperature": temperature}
    if with_bias:
        transform["bias"] = h.bias
    found = linear_logprobs(h.hidden, h.weight, h.targets, **transform, want=want, **tiles)
    expected = materialized(h.hidden, h.weight, h.targets, **transform, want=want)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(pull(found), inputs)
    truth = torch.autograd.grad(pull(expected), inputs)
    for gradient, true in zip(gradients, truth, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_finite_differences(softcap: float | None) -> None:
    h = head(num_tokens=4, dim=3, vocab=8)

    def all_three(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
        options = {"scale": 0.5, "softcap": softcap, "temperature": 0.7, "want": ("entropy", "vocab_mean_logprobs")}
        return linear_logprobs(hidden, weight, h.targets, bias=bias, **options, **SMALL_TILES)[:3]

    assert torch.autograd.gradcheck(all_three, h.inputs)


@pytest.mark.parametrize("name", ["entropy", "vocab_mean_logprobs"])
def test_gradient_of_one_statistic_alone(name: str) -> None:
    h = head()
    found = getattr(linear_logprobs(h.hidden, h.weight, h.targets, want=[name], **SMALL_TILES), name)
    expected = getattr(materialized(h.hidden, h.weight, h.targets), name)
    gradients = torch.autograd.grad(found.square().sum(), h.inputs[:2])
    for gradient, true in zip(gradients, torch.autograd.grad(expected.square().sum(), h.inputs[:2]), strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-11, atol=1e-12)


def test_label_smoothing_through_the_fused_head() -> None:
    """ε of the labels anywhere: the gradient of the logits is the softmax minus the smoothed label."""
    h = head()
    found = linear_logprobs(h.hidden, h.weight, h.targets, bias=h.bias, want=["vocab_mean_logprobs"], **SMALL_TILES)
    assert found.vocab_mean_logprobs is not None
    losses = label_smoothed_nll(found.logprobs, found.vocab_mean_logprobs, label_smoothing=0.2)
    logits = h.hidden @ h.weight.t() + h.bias
    peer = torch.nn.functional.cross_entropy(logits, h.targets, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(losses, peer)
    gradients = torch.autograd.grad(losses.sum(), h.inputs)
    for gradient, true in zip(gradients, torch.autograd.grad(peer.sum(), h.inputs), strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("want", WANTS[1:], ids=",".join)
def test_what_is_asked_for_but_unused_changes_nothing(want: tuple[str, ...]) -> None:
    h = head()
    plain = linear_logprobs(h.hidden, h.weight, h.targets).logprobs
    beside = linear_logprobs(h.hidden, h.weight, h.targets, want=want).logprobs
    assert torch.equal(plain, beside)
    for one, other in zip(
        torch.autograd.grad(plain.sum(), h.inputs[:2]), torch.autograd.grad(beside.sum(), h.inputs[:2]), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tiles", [{}, SMALL_TILES], ids=["one tile", "many tiles"])
def test_no_tokens(tiles: dict[str, int]) -> None:
    h = head(num_tokens=0)
    found = linear_logprobs(h.hidden, h.weight, h.targets, bias=h.bias, want=ALL, **tiles)
    assert [each.shape for each in found if each is not None] == [(0,)] * 4
    for gradient, of in zip(torch.autograd.grad(pull(found), h.inputs), h.inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(of))


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {1, 2}, {0, 1}])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: set[int]) -> None:
    h = head()
    everything = torch.autograd.grad(
        linear_logprobs(h.hidden, h.weight, h.targets, bias=h.bias).logprobs.sum(), h.inputs
    )
    inputs = [x.detach() if i in frozen else x.detach().requires_grad_() for i, x in enumerate(h.inputs)]
    with Watch() as watch:
        linear_logprobs(inputs[0], inputs[1], h.targets, bias=inputs[2], **SMALL_TILES).logprobs.sum().backward()
    for i, (tensor, gradient) in enumerate(zip(inputs, everything, strict=True)):
        if i in frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-11, atol=1e-12)
    num_tiles = 4 * 4  # 10 tokens by 3, 23 entries by 7
    assert watch.num_products == num_tiles * (2 + len({0, 1} - frozen)), "a product that nobody wants, or one too few"
    if 1 in frozen:
        assert watch.num_elements < h.weight.numel(), "room for a gradient that nobody wants"


def test_no_gradient_at_all() -> None:
    h = head()
    with torch.no_grad():
        found = linear_logprobs(h.hidden, h.weight, h.targets, want=ALL)
    assert not any(each.requires_grad for each in found if each is not None)
    assert_close(found, materialized(h.hidden, h.weight, h.targets), rtol=1e-12, atol=1e-12)


def halved(found: TokenStatistics) -> TokenStatistics:
    """With half the collision: Σ_v p_v² sees logits twice as large, and twice what rounding does to them."""
    assert found.log_collision is not None
    return found._replace(log_collision=found.log_collision / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_against_float32_truth(dtype: torch.dtype) -> None:
    """The truth: float64 on the same rounded inputs. Tolerances: what rounding logits of this size in that type costs.

    bfloat16 has 8 bits: products of about 3 are off by up to 2⁻⁷ each where the machine multiplies in bfloat16, and
    gradients by 2⁻⁸ of the largest. Softmax and sums in bfloat16 would be ten times worse than these bounds.
    """
    h = head(num_tokens=40, dim=16, vocab=500, dtype=dtype)
    hidden, weight = (h.hidden.detach() / 2).requires_grad_(), (h.weight.detach() / 2).requires_grad_()
    found = linear_logprobs(hidden, weight, h.targets, want=ALL, chunk_size=16, vocab_chunk_size=64)
    assert {each.dtype for each in found if each is not None} == {torch.float32}
    expected = materialized(hidden, weight, h.targets)
    rounding = torch.finfo(dtype).eps
    assert_close(halved(found), halved(expected), rtol=0, atol=2 * rounding)
    gradients = torch.autograd.grad(pull(found), [hidden, weight])
    truth = torch.autograd.grad(pull(expected), [hidden, weight])
    for gradient, true in zip(gradients, truth, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - true.double()).abs().max() / true.double().abs().max()
        assert error < 2 * rounding


def test_half_precision_gradients_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over however many tiles, they are rounded once."""
    monkeypatch.setattr(logprobs_module, "product_dtype", lambda x: torch.float32)
    h = head(num_tokens=40, dim=16, vocab=500, dtype=torch.bfloat16)
    inputs, tiles = [h.hidden, h.weight, h.bias], {"chunk_size": 4, "vocab_chunk_size": 8}
    found = pull(linear_logprobs(h.hidden, h.weight, h.targets, bias=h.bias, **tiles))
    truth = pull(materialized(h.hidden, h.weight, h.targets, bias=h.bias, want=()))
    for gradient, true in zip(*(torch.autograd.grad(each, inputs) for each in (found, truth)), strict=True):
        torch.testing.assert_close(gradient, true, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


def test_products_in_bfloat16_where_the_machine_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path for machines with bfloat16 instructions, forced: the same results to bfloat16's rounding."""
    h = head(num_tokens=40, dim=16, vocab=300, dtype=torch.bfloat16)
    results = []
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        found = linear_logprobs(
            h.hidden, h.weight, h.targets, bias=h.bias, scale=0.5, softcap=5.0, want=ALL, chunk_size=16
        )
        results.append((*found, *torch.autograd.grad(pull(found), h.inputs)))
    for exact, rounded in zip(*results, strict=True):
        assert not torch.equal(exact, rounded), "both ran on the same path"
        error = (exact.double() - rounded.double()).abs().max() / exact.double().abs().max()
        assert error < 2 * torch.finfo(torch.bfloat16).eps


def test_float32_keeps_its_digits_where_logits_are_large() -> None:
    """Logits of ±1e4 whose gaps are small numbers: exact in float32, and so must the results be."""
    hidden = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[1e4, 0.0], [1e4, 1.0], [1e4, 2.0]], requires_grad=True)
    found = linear_logprobs(hidden, weight, torch.tensor([1, 2]), want=ALL, vocab_chunk_size=2)
    expected = token_statistics(torch.tensor([[0.0, 1.0, 2.0]] * 2), torch.tensor([1, 2]), want=ALL)
    assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_hopeless_and_certain_targets() -> None:
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    found = linear_logprobs(hidden, weight, torch.tensor([0, 1]), want=ALL, vocab_chunk_size=1)
    assert [each.tolist() for each in found if each is not None] == [[0, -2e4], [0, 0], [-1e4, -1e4], [0, 0]]
    assert found.entropy is not None
    gradients = torch.autograd.grad(found.logprobs.sum() + found.entropy.sum(), [hidden, weight])
    assert gradients[0].tolist() == [[0], [-2e4]]
    assert gradients[1].tolist() == [[-1], [1], [0]]


class Watch(TorchDispatchMode):
    """The most elements that any operation under it wrote into one new tensor, and how many matrices it multiplied."""

    num_elements = 0
    num_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.mm)
        if isinstance(out, Tensor) and not any(out is arg for arg in args) and not out._is_view():
            self.num_elements = max(self.num_elements, out.numel())
        return out


@pytest.mark.parametrize("want", WANTS, ids=lambda want: ",".join(want) or "nothing")
def test_logits_exist_one_tile_at_a_time(want: tuple[str, ...]) -> None:
    h = head(num_tokens=64, dim=4, vocab=4096, dtype=torch.float32)

    def largest(function: Any, **options: Any) -> int:
        with Watch() as mode:
            pull(function(h.hidden, h.weight, h.targets, bias=h.bias, want=want, **options)).backward()
        return mode.num_elements

    tiles = {"chunk_size": 16, "vocab_chunk_size": 512}
    fused = largest(linear_logprobs, softcap=3.0, **tiles)
    assert fused == h.weight.numel(), "nothing may be larger than the gradient of the weights"
    assert largest(materialized) == 64 * 4096, "the probe itself must see the plain computation's logits"
    h.weight.requires_grad_(False)
    assert largest(linear_logprobs, softcap=3.0, **tiles) == 16 * 512


def test_kept_for_the_backward_pass_are_inputs_and_a_few_numbers_a_token() -> None:
    h = head(num_tokens=64, dim=4, vocab=512, dtype=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_logprobs(h.hidden, h.weight, h.targets, want=ALL)
    inputs = {h.hidden.data_ptr(), h.weight.data_ptr(), h.targets.data_ptr()}
    assert sum(x.numel() for x in kept if x.data_ptr() not in inputs) == 2 * 64


def test_same_bits_every_time() -> None:
    h = head(num_tokens=50, dim=8, vocab=100, dtype=torch.float32)
    targets = torch.zeros(50, dtype=torch.int64)  # the same row of the weights for all
    runs = []
    for _ in range(2):
        found = linear_logprobs(h.hidden, h.weight, targets, want=ALL, **SMALL_TILES)
        runs.append((*found, *torch.autograd.grad(pull(found), h.inputs[:2])))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_one_row_at_a_time_is_the_batch() -> None:
    """Micro-batches add up: gradients of the rows apart sum to the gradient of all."""
    h = head()
    together = torch.autograd.grad(linear_logprobs(h.hidden, h.weight, h.targets).logprobs.sum(), h.weight)[0]
    apart = torch.zeros_like(together)
    for i in range(len(h.hidden)):
        logprobs = linear_logprobs(h.hidden[i : i + 1], h.weight, h.targets[i : i + 1]).logprobs
        apart += torch.autograd.grad(logprobs.sum(), h.weight)[0]
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-12)


def test_no_second_derivative_is_said_and_not_wrong() -> None:
    h = head()
    (gradient,) = torch.autograd.grad(
        linear_logprobs(h.hidden, h.weight, h.targets).logprobs.square().sum(), h.hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("temperature must be positive", {"temperature": 0.0}),
        ("softcap must be positive", {"softcap": -1.0}),
        ("chunk_size must be positive", {"chunk_size": 0}),
        ("vocab_chunk_size must be positive", {"vocab_chunk_size": 0}),
        ("bias is torch.float32", {"bias": torch.zeros(23)}),
        ("want names entropies, but knows only entropy, vocab_mean_logprobs, log_coll", {"want": ["entropies"]}),
    ],
)
def test_settings_out_of_range_are_named(message: str, options: dict[str, Any]) -> None:
    h = head()
    with pytest.raises(ValueError, match=message):
        linear_logprobs(h.hidden, h.weight, h.targets, **options)


@pytest.mark.parametrize("want", WANTS)
def test_a_given_sum_takes_the_weights_gradient_of_every_call(want) -> None:
    """Two calls add up; autograd is handed none of it; the other gradients are what they were."""
    h, total = head(), torch.zeros(23, 6, dtype=torch.float64)

    def gradients(part: slice, weight_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        found = linear_logprobs(
            h.hidden[part], h.weight, h.targets[part], bias=h.bias, want=want, weight_grad=weight_grad, **SMALL_TILES
        )
        loss = sum(each.square().sum() for each in found if each is not None and each.requires_grad)
        return torch.autograd.grad(loss, h.inputs, allow_unused=True)

    parts = slice(0, 4), slice(4, 10)
    plain, summed = ([gradients(part, each) for part in parts] for each in (None, total))
    assert all(weight is None for _, weight, _ in summed)
    torch.testing.assert_close(total, plain[0][1] + plain[1][1], rtol=0, atol=1e-14)
    for mine, true in zip(summed, plain, strict=True):
        assert torch.equal(mine[0], true[0])
        assert torch.equal(mine[2], true[2])


def test_a_sum_of_another_kind_is_named() -> None:
    h = head()
    with pytest.raises(ValueError, match=r"weight_grad is torch.float32, and sums of torch.float64 are torch.float64"):
        linear_logprobs(h.hidden, h.weight, h.targets, weight_grad=torch.zeros(23, 6))
    with pytest.raises(ValueError, match=r"weight_grad has the shape \(1, 6\), expected \(23, 6\)"):
        linear_logprobs.__wrapped__(h.hidden, h.weight, h.targets, weight_grad=torch.zeros(1, 6, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "num_rows"), [(torch.float32, 1024), (torch.bfloat16, 2048)])
def test_default_tiles_of_a_cpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_rows: int) -> None:
    sizes, slices = [], logprobs_module._slices
    monkeypatch.setattr(logprobs_module, "_slices", lambda length, size: sizes.append(size) or slices(length, size))
    monkeypatch.setattr(logprobs_module, "product_dtype", lambda x: x.dtype)
    h = head(dtype=dtype)
    linear_logprobs(h.hidden, h.weight, h.targets)
    assert sizes == [num_rows, 1024]


@pytest.mark.parametrize("want", WANTS)
def test_padding_to_a_size_changes_nothing(monkeypatch, want) -> None:
    def results() -> list[Tensor]:
        h = head()
        found = linear_logprobs(h.hidden, h.weight, h.targets, bias=h.bias, want=want, **SMALL_TILES)
        values = [each for each in found if each is not None]
        loss = sum(each.square().sum() for each in values if each.requires_grad)
        return [*values, *torch.autograd.grad(loss, h.inputs)]

    expected = results()
    monkeypatch.setattr(logprobs_module, "grid_padding", lambda length, like: 5)
    for mine, true in zip(results(), expected, strict=True):
        assert len(mine) == len(true)
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-13)


def test_mistaken_inputs_are_named() -> None:
    h = head()
    with pytest.raises(ValueError, match=r"hidden is torch.float32 but weight is torch.float64"):
        linear_logprobs(h.hidden.float(), h.weight, h.targets)
    for wrong in (-100, 23):
        with pytest.raises(ValueError, match="outside the vocabulary of 23"):
            linear_logprobs(h.hidden, h.weight, torch.full((10,), wrong))
    for function in (
        lambda: token_logprobs(h.hidden, h.targets % 6, temperature=0.0),
        lambda: entropy(h.hidden, temperature=0.0),
        lambda: vocab_mean_logprobs(h.hidden, temperature=0.0),
        lambda: log_collision(h.hidden, temperature=0.0),
    ):
        with pytest.raises(ValueError, match="temperature must be positive"):
            function()
    with pytest.raises(ValueError, match="want names entropies"):
        token_statistics(h.hidden, h.targets % 6, want=["entropies"])
