"""Log-probabilities and entropies: against the plain computation over all logits, values and gradients alike."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trueup.objectives.logprobs import entropy, linear_logprobs, sequence_logprobs, token_logprobs

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
) -> tuple[Tensor, Tensor]:
    """The definition, through all logits in float64."""
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs[torch.arange(len(targets)), targets], -(logprobs.exp() * logprobs).sum(-1)


def pull(logprobs: Tensor, entropies: Tensor | None) -> Tensor:
    """A scalar that weighs every result differently, so that no two gradients are alike."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=torch.float64)
    total = (weights * logprobs).sum()
    return total if entropies is None else total + (weights.flip(0).square() * entropies).sum()


# --- token, entropy, sequence ------------------------------------------------------------------------------------


def test_token_goldens() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    targets = torch.tensor([2, 0])
    assert token_logprobs(logits, targets).exp().tolist() == pytest.approx([4 / 7, 1 / 3])
    # temperature 1/2 squares the odds: 1, 4, 16
    assert token_logprobs(logits, targets, temperature=0.5).exp().tolist() == pytest.approx([16 / 21, 1 / 3])
    assert entropy(logits)[1].item() == pytest.approx(math.log(3))
    expected = -sum(p / 7 * math.log(p / 7) for p in (1, 2, 4))
    assert entropy(logits)[0].item() == pytest.approx(expected)
    assert entropy(logits, temperature=1e-3)[0].item() == pytest.approx(0, abs=1e-12)


def test_token_logprobs_and_entropy_gradients() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, targets, temperature=0.7), (logits,))
    assert torch.autograd.gradcheck(lambda z: entropy(z, temperature=0.7), (logits,))


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    logits = torch.randn(7, dtype=torch.float64).expand(7, 7)
    assert token_logprobs(logits, torch.arange(7)).exp().sum().item() == pytest.approx(1, rel=1e-14)


def test_half_precision_logits_are_raised() -> None:
    logits = torch.randn(4, 100).bfloat16()
    targets = torch.arange(4)
    assert torch.equal(token_logprobs(logits, targets), token_logprobs(logits.float(), targets))
    assert entropy(logits).dtype == torch.float32


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert token_logprobs(logits, torch.tensor([0])).item() == 0
    assert token_logprobs(logits, torch.tensor([1])).item() == -2e4
    assert entropy(logits).item() == 0


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
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("scale", "softcap", "temperature", "with_bias"), OPTIONS)
def test_values_and_gradients_are_those_of_all_logits(
    scale: float, softcap: float | None, temperature: float, with_bias: bool, with_entropy: bool, tiles: dict[str, int]
) -> None:
    h = head()
    inputs = h.inputs if with_bias else h.inputs[:2]
    transform: dict[str, Any] = {"scale": scale, "softcap": softcap, "temperature": temperature}
    if with_bias:
        transform["bias"] = h.bias
    logprobs, entropies = linear_logprobs(
        h.hidden, h.weight, h.targets, **transform, with_entropy=with_entropy, **tiles
    )
    expected, expected_entropies = materialized(h.hidden, h.weight, h.targets, **transform)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    if with_entropy:
        assert entropies is not None
        torch.testing.assert_close(entropies, expected_entropies, rtol=1e-12, atol=1e-12)
    else:
        assert entropies is None
    gradients = torch.autograd.grad(pull(logprobs, entropies), inputs)
    truth = torch.autograd.grad(pull(expected, expected_entropies if with_entropy else None), inputs)
    for gradient, true in zip(gradients, truth, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_finite_differences(softcap: float | None) -> None:
    h = head(num_tokens=4, dim=3, vocab=8)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        options = {"scale": 0.5, "softcap": softcap, "temperature": 0.7, "with_entropy": True}
        return linear_logprobs(hidden, weight, h.targets, bias=bias, **options, **SMALL_TILES)

    assert torch.autograd.gradcheck(both, h.inputs)


def test_gradient_of_the_entropy_alone() -> None:
    h = head()
    _, entropies = linear_logprobs(h.hidden, h.weight, h.targets, with_entropy=True, **SMALL_TILES)
    _, expected = materialized(h.hidden, h.weight, h.targets)
    assert entropies is not None
    gradients = torch.autograd.grad(entropies.square().sum(), h.inputs[:2])
    for gradient, true in zip(gradients, torch.autograd.grad(expected.square().sum(), h.inputs[:2]), strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-11, atol=1e-12)


def test_entropy_asked_for_but_unused_changes_no_gradient() -> None:
    h = head()
    plain, _ = linear_logprobs(h.hidden, h.weight, h.targets)
    beside, _ = linear_logprobs(h.hidden, h.weight, h.targets, with_entropy=True)
    assert torch.equal(plain, beside)
    for one, other in zip(
        torch.autograd.grad(plain.sum(), h.inputs[:2]), torch.autograd.grad(beside.sum(), h.inputs[:2]), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tiles", [{}, SMALL_TILES], ids=["one tile", "many tiles"])
def test_no_tokens(tiles: dict[str, int]) -> None:
    h = head(num_tokens=0)
    logprobs, entropies = linear_logprobs(h.hidden, h.weight, h.targets, bias=h.bias, with_entropy=True, **tiles)
    assert logprobs.shape == (0,)
    assert entropies is not None
    assert entropies.shape == (0,)
    for gradient, of in zip(torch.autograd.grad(logprobs.sum() + entropies.sum(), h.inputs), h.inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(of))


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {1, 2}, {0, 1}])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: set[int]) -> None:
    h = head()
    everything = torch.autograd.grad(linear_logprobs(h.hidden, h.weight, h.targets, bias=h.bias)[0].sum(), h.inputs)
    inputs = [x.detach() if i in frozen else x.detach().requires_grad_() for i, x in enumerate(h.inputs)]
    with Watch() as watch:
        linear_logprobs(inputs[0], inputs[1], h.targets, bias=inputs[2], **SMALL_TILES)[0].sum().backward()
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
        logprobs, _ = linear_logprobs(h.hidden, h.weight, h.targets)
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs, materialized(h.hidden, h.weight, h.targets)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_against_float32_truth(dtype: torch.dtype) -> None:
    """The truth: float64 on the same rounded inputs. Tolerances: what rounding logits of this size in that type costs.

    bfloat16 has 8 bits: products of about 3 are off by up to 2⁻⁷ each where the machine multiplies in bfloat16, and
    gradients by 2⁻⁸ of the largest. Softmax and sums in bfloat16 would be ten times worse than these bounds.
    """
    h = head(num_tokens=40, dim=16, vocab=500, dtype=dtype)
    hidden, weight = (h.hidden.detach() / 2).requires_grad_(), (h.weight.detach() / 2).requires_grad_()
    logprobs, entropies = linear_logprobs(
        hidden, weight, h.targets, with_entropy=True, chunk_size=16, vocab_chunk_size=64
    )
    assert logprobs.dtype == torch.float32
    expected, expected_entropies = materialized(hidden, weight, h.targets)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2 * rounding)
    assert entropies is not None
    torch.testing.assert_close(entropies.double(), expected_entropies, rtol=0, atol=2 * rounding)
    gradients = torch.autograd.grad(pull(logprobs, entropies), [hidden, weight])
    truth = torch.autograd.grad(pull(expected, expected_entropies), [hidden, weight])
    for gradient, true in zip(gradients, truth, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - true.double()).abs().max() / true.double().abs().max()
        assert error < 2 * rounding


def test_products_in_bfloat16_where_the_machine_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path for machines with bfloat16 instructions, forced: the same results to bfloat16's rounding."""
    h = head(num_tokens=40, dim=16, vocab=300, dtype=torch.bfloat16)
    results = []
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        logprobs, entropies = linear_logprobs(
            h.hidden, h.weight, h.targets, bias=h.bias, scale=0.5, softcap=5.0, with_entropy=True, chunk_size=16
        )
        results.append((logprobs, entropies, *torch.autograd.grad(pull(logprobs, entropies), h.inputs)))
    for exact, rounded in zip(*results, strict=True):
        assert not torch.equal(exact, rounded), "both ran on the same path"
        error = (exact.double() - rounded.double()).abs().max() / exact.double().abs().max()
        assert error < 2 * torch.finfo(torch.bfloat16).eps


def test_float32_keeps_its_digits_where_logits_are_large() -> None:
    """Logits of ±1e4 whose gaps are small numbers: exact in float32, and so must the results be."""
    hidden = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[1e4, 0.0], [1e4, 1.0], [1e4, 2.0]], requires_grad=True)
    logprobs, entropies = linear_logprobs(hidden, weight, torch.tensor([1, 2]), with_entropy=True, vocab_chunk_size=2)
    expected = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)
    torch.testing.assert_close(logprobs, expected[[1, 2]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies, entropy(torch.tensor([[0.0, 1.0, 2.0]] * 2)), rtol=1e-6, atol=1e-6)


def test_hopeless_and_certain_targets() -> None:
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    logprobs, entropies = linear_logprobs(hidden, weight, torch.tensor([0, 1]), with_entropy=True, vocab_chunk_size=1)
    assert logprobs.tolist() == [0, -2e4]
    assert entropies is not None
    assert entropies.tolist() == [0, 0]
    gradients = torch.autograd.grad(logprobs.sum() + entropies.sum(), [hidden, weight])
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


@pytest.mark.parametrize("with_entropy", [False, True])
def test_logits_exist_one_tile_at_a_time(with_entropy: bool) -> None:
    h = head(num_tokens=64, dim=4, vocab=4096, dtype=torch.float32)

    def largest(function: Any, **options: Any) -> int:
        with Watch() as mode:
            logprobs, entropies = function(h.hidden, h.weight, h.targets, bias=h.bias, **options)
            pull(logprobs, entropies if with_entropy else None).backward()
        return mode.num_elements

    tiles = {"chunk_size": 16, "vocab_chunk_size": 512}
    fused = largest(linear_logprobs, softcap=3.0, with_entropy=with_entropy, **tiles)
    assert fused == h.weight.numel(), "nothing may be larger than the gradient of the weights"
    assert largest(materialized) == 64 * 4096, "the probe itself must see the plain computation's logits"
    h.weight.requires_grad_(False)
    assert largest(linear_logprobs, softcap=3.0, with_entropy=with_entropy, **tiles) == 16 * 512


def test_kept_for_the_backward_pass_are_inputs_and_a_few_numbers_a_token() -> None:
    h = head(num_tokens=64, dim=4, vocab=512, dtype=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_logprobs(h.hidden, h.weight, h.targets, with_entropy=True)
    inputs = {h.hidden.data_ptr(), h.weight.data_ptr(), h.targets.data_ptr()}
    assert sum(x.numel() for x in kept if x.data_ptr() not in inputs) == 2 * 64


def test_same_bits_every_time() -> None:
    h = head(num_tokens=50, dim=8, vocab=100, dtype=torch.float32)
    targets = torch.zeros(50, dtype=torch.int64)  # the same row of the weights for all
    runs = []
    for _ in range(2):
        logprobs, _ = linear_logprobs(h.hidden, h.weight, targets, **SMALL_TILES)
        runs.append((logprobs, *torch.autograd.grad(logprobs.sum(), h.inputs[:2])))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_one_row_at_a_time_is_the_batch() -> None:
    """Micro-batches add up: gradients of the rows apart sum to the gradient of all."""
    h = head()
    together = torch.autograd.grad(linear_logprobs(h.hidden, h.weight, h.targets)[0].sum(), h.weight)[0]
    apart = torch.zeros_like(together)
    for i in range(len(h.hidden)):
        logprobs, _ = linear_logprobs(h.hidden[i : i + 1], h.weight, h.targets[i : i + 1])
        apart += torch.autograd.grad(logprobs.sum(), h.weight)[0]
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-12)


def test_no_second_derivative_is_said_and_not_wrong() -> None:
    h = head()
    (gradient,) = torch.autograd.grad(
        linear_logprobs(h.hidden, h.weight, h.targets)[0].square().sum(), h.hidden, create_graph=True
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
    ],
)
def test_settings_out_of_range_are_named(message: str, options: dict[str, Any]) -> None:
    h = head()
    with pytest.raises(ValueError, match=message):
        linear_logprobs(h.hidden, h.weight, h.targets, **options)


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
    ):
        with pytest.raises(ValueError, match="temperature must be positive"):
            function()
