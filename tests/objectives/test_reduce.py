"""Reductions: hand-computed values, masks that keep NaN out, and micro-batches that add up to the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trueup.objectives.reduce import constant_length_mean, sequence_mean, sequence_sum, token_mean

NAN = float("nan")
VALUES = torch.tensor([[1.0, 2.0, 3.0, NAN], [10.0, NAN, NAN, NAN]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


def test_golden() -> None:
    assert sequence_sum(VALUES, MASK).tolist() == [6.0, 10.0]
    assert token_mean(VALUES, MASK).item() == 16 / 4
    assert sequence_mean(VALUES, MASK).item() == (2 + 10) / 2
    assert constant_length_mean(VALUES, MASK, 8).item() == 16 / (8 * 2)


def test_a_mean_of_means_is_not_a_token_mean() -> None:
    """The three reductions weigh a token of a long and of a short completion differently."""
    values = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    weights = {}
    for name, loss in (
        ("token", token_mean(values, MASK)),
        ("sequence", sequence_mean(values, MASK)),
        ("constant", constant_length_mean(values, MASK, 4)),
    ):
        (gradient,) = torch.autograd.grad(loss, values)
        assert gradient[~MASK].eq(0).all()
        weights[name] = (gradient[0, 0].item(), gradient[1, 0].item())
    assert weights == {"token": (1 / 4, 1 / 4), "sequence": (1 / 6, 1 / 2), "constant": (1 / 8, 1 / 8)}


def test_equal_lengths_make_all_means_equal() -> None:
    values = torch.randn(3, 5, dtype=torch.float64)
    mask = torch.ones(3, 5, dtype=torch.bool)
    expected = values.mean()
    for result in (token_mean(values, mask), sequence_mean(values), constant_length_mean(values, None, 5)):
        torch.testing.assert_close(result, expected)


def test_rows_may_lie_in_any_shape() -> None:
    values = torch.arange(12, dtype=torch.float64).view(4, 3)
    assert sequence_mean(values) == 5.5
    assert sequence_mean(values, None, 8) == 5.5 / 2
    for reduction in (token_mean, sequence_mean, lambda v: constant_length_mean(v, None, 7)):
        assert reduction(values.view(2, 1, 2, 3)) == reduction(values)


def test_counts_are_exact_in_half_precision() -> None:
    """There are more tokens than the largest float16."""
    assert token_mean(torch.full((256, 300), 2**-12, dtype=torch.float16)).item() == pytest.approx(2**-12, rel=1e-3)


def test_nothing_scored_gives_zero() -> None:
    nothing = torch.zeros_like(MASK)
    assert token_mean(VALUES, nothing) == 0
    assert sequence_mean(VALUES, nothing) == 0
    # A sequence without scored tokens adds 0 and is still one of the sequences.
    only_second = torch.tensor([[False] * 4, [True, False, False, False]])
    assert sequence_mean(VALUES, only_second) == 10 / 2


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 7),
    tokens=st.integers(1, 6),
    cut=st.integers(1, 7),
)
def test_micro_batches_add_up(seed: int, rows: int, tokens: int, cut: int) -> None:
    """With the whole batch's denominator, values and gradients of the parts add up, wherever it is cut."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, tokens, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(rows, tokens, generator=generator) < 0.7
    scored = mask.sum().clamp(min=1)
    reductions = {
        "token": (lambda v, m, d=None: token_mean(v, m, d), scored),
        "sequence": (lambda v, m, d=None: sequence_mean(v, m, d), rows),
        "constant": (lambda v, m, d=None: constant_length_mean(v, m, 9, d), rows),
    }
    for reduction, denominator in reductions.values():
        whole = reduction(values, mask)
        parts = sum(
            reduction(values[i : i + cut], mask[i : i + cut], denominator) for i in range(0, rows, cut)
        ) + torch.zeros(())
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(
            torch.autograd.grad(parts, values)[0], torch.autograd.grad(whole, values)[0], rtol=1e-12, atol=1e-14
        )


def test_without_the_denominator_micro_batches_do_not_add_up() -> None:
    """The mean of two token means is another objective when the parts hold different numbers of tokens."""
    halves = (token_mean(VALUES[:1], MASK[:1]) + token_mean(VALUES[1:], MASK[1:])) / 2
    assert halves.item() == 6.0
    assert token_mean(VALUES, MASK).item() == 4.0


def test_order_and_padding_do_not_matter() -> None:
    values, mask = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5) < 0.6
    order = torch.tensor([2, 0, 3, 1])
    padded = torch.nn.functional.pad(values, (0, 3), value=NAN)
    padded_mask = torch.nn.functional.pad(mask, (0, 3), value=False)
    for reduction in (token_mean, sequence_mean, lambda v, m: constant_length_mean(v, m, 5)):
        expected = reduction(values, mask)
        torch.testing.assert_close(reduction(values[order], mask[order]), expected)
        torch.testing.assert_close(reduction(padded, padded_mask), expected)
    torch.testing.assert_close(sequence_sum(padded, padded_mask), sequence_sum(values, mask))


def test_gradients_match_finite_differences() -> None:
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    for reduction in (sequence_sum, token_mean, sequence_mean, lambda v, m: constant_length_mean(v, m, 3, 5)):
        assert torch.autograd.gradcheck(lambda v, reduction=reduction: reduction(v, mask), values)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="positive"):
        token_mean(VALUES, MASK, 0)
    with pytest.raises(ValueError, match="positive"):
        constant_length_mean(VALUES, MASK, -1)
