"""Derivatives by hand against autograd of the losses of the same name, on both sides of every kink; goldens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trueup.objectives import derivatives, value
from trueup.objectives import policy_gradient as pg
from trueup.objectives.divergence import categorical_kl
from trueup.objectives.gaussian import gaussian_entropy, gaussian_kl, gaussian_logprobs
from trueup.objectives.logprobs import entropy, token_logprobs


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def by_autograd(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∂/∂x of the loss's sum: of every entry's own loss, as no entry is part of another's."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


SIDES = (-1e-6, 1e-6)
"""Of a kink: just below and just above."""
SEEDS = pytest.mark.parametrize("seed", range(3))
numbers = st.floats(-10, 10)
sizes = st.floats(0.01, 3)


def test_surrogates_golden() -> None:
    assert derivatives.reinforce(t(-1, -1), t(2, -3)).tolist() == [-2, 3]
    assert derivatives.surrogate(t(0.5, 2), t(4, -3)).tolist() == [-2, 6]
    # clipped at ½ and 2: no derivative beyond the range in the direction of the advantage, −ρ·A elsewhere
    ratios = t(0.25, 1, 4)
    found = derivatives.clipped_surrogate(ratios, t(1, 1, 1), clip_low=0.5, clip_high=1.0)
    assert found.tolist() == [-0.25, -1, 0]
    found = derivatives.clipped_surrogate(ratios, t(-1, -1, -1), clip_low=0.5, clip_high=1.0)
    assert found.tolist() == [0, 1, 4]
    # on the bounds themselves it is still there
    found = derivatives.clipped_surrogate(t(0.5, 2), t(-1, 1), clip_low=0.5, clip_high=1.0)
    assert found.tolist() == [0.5, -2]


def test_value_losses_golden() -> None:
    assert derivatives.value_loss(t(3, 1), t(1, 1)).tolist() == [2, 0]
    # old value 0, clip 1. From 3 the return 5 is worse for the clipped value 1, which doesn't move: 0; the return 0 is
    # worse for 3 itself: 3 − 0. Within the range both are the same, V − G, on its bound too.
    found = derivatives.clipped_value_loss(t(3, 3, 0.5, 1), t(0, 0, 0, 0), t(5, 0, 1, 5), clip=1.0)
    assert found.tolist() == [0, 3, -0.5, -4]
    assert derivatives.clipped_value_loss(t(-3, -3), t(0, 0), t(-5, 0), clip=1.0).tolist() == [0, -3]
    # no range at all: only what is worse than the old value, 1, has a derivative
    assert derivatives.clipped_value_loss(t(3, 3), t(1, 1), t(5, 0), clip=0.0).tolist() == [0, 3]
    assert derivatives.huber_value_loss(t(0.5, 3, -3), t(0, 0, 0), delta=1.0).tolist() == [0.5, 1, -1]
    assert derivatives.huber_value_loss(t(3, 1.5), t(0, 0), delta=2.0).tolist() == [2, 1.5]
    assert derivatives.huber_value_loss(t(3), t(0)).tolist() == [1]


@SEEDS
def test_reinforce(seed: int) -> None:
    logprobs, advantages = normal(2, 5, 7, seed=seed)
    assert_same(
        derivatives.reinforce(logprobs, advantages), by_autograd(lambda x: pg.reinforce(x, advantages), logprobs)
    )


@SEEDS
def test_surrogate(seed: int) -> None:
    """And of the one with a KL penalty, as long as the KL isn't moved with it."""
    logprobs, old_logprobs, advantages, kl = normal(4, 5, 7, seed=seed)
    found = derivatives.surrogate(pg.ratio(logprobs, old_logprobs), advantages)

    def loss(x: Tensor) -> Tensor:
        return pg.kl_penalized_surrogate(pg.ratio(x, old_logprobs), advantages, kl, kl_coef=0.7)

    assert_same(found, by_autograd(loss, logprobs))
    by_kl = by_autograd(
        lambda x: pg.kl_penalized_surrogate(pg.ratio(logprobs, old_logprobs), advantages, x, kl_coef=0.7), kl
    )
    assert_same(by_kl, torch.full_like(kl, 0.7))


def check_clipped_surrogate(ratios: Tensor, advantages: Tensor, low: float, high: float) -> None:
    """Autograd goes through the ratio to the log-probs."""
    found = derivatives.clipped_surrogate(ratios, advantages, clip_low=low, clip_high=high)
    expected = by_autograd(
        lambda x: pg.clipped_surrogate(x.exp(), advantages, clip_low=low, clip_high=high), ratios.log()
    )
    assert_same(found, expected)


@SEEDS
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.4), (1.0, 0.0)])
def test_clipped_surrogate(low: float, high: float, seed: int) -> None:
    log_ratios, advantages = normal(2, 5, 7, seed=seed)
    check_clipped_surrogate(log_ratios.exp(), advantages, low, high)


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_clipped_surrogate_on_either_side_of_its_bounds(advantage: float) -> None:
    ratios = t(*(kink + side for kink in (0.8, 1.3) for side in SIDES))
    check_clipped_surrogate(ratios, torch.full_like(ratios, advantage), 0.2, 0.3)
    found = derivatives.clipped_surrogate(ratios, torch.full_like(ratios, advantage), clip_low=0.2, clip_high=0.3)
    # the only one of the four that is out of the range in the direction of its advantage
    zeros = {-1.0: [True, False, False, False], 0.0: [True] * 4, 1.0: [False, False, False, True]}
    assert (found == 0).tolist() == zeros[advantage]


@SEEDS
def test_value_loss(seed: int) -> None:
    values, returns = normal(2, 5, 7, seed=seed)
    assert_same(derivatives.value_loss(values, returns), by_autograd(lambda x: value.value_loss(x, returns), values))


def check_clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    found = derivatives.clipped_value_loss(values, old_values, returns, clip=clip)
    expected = by_autograd(lambda x: value.clipped_value_loss(x, old_values, returns, clip=clip), values)
    assert_same(found, expected)
    return found


@SEEDS
@pytest.mark.parametrize("clip", [0.0, 0.2, 1.0])
def test_clipped_value_loss(clip: float, seed: int) -> None:
    found = check_clipped_value_loss(*normal(3, 5, 7, seed=seed), clip)
    assert 0 < (found == 0).sum() < found.numel()


def test_clipped_value_loss_on_either_side_of_its_kinks() -> None:
    """The range's bounds (here old ± 1), with returns on both sides; and, beyond the bound, where both errors are
    equally large: at V = 2 the return 1.5 is as far as from V_c = 1."""
    bounds = t(*(kink + side for kink in (-1.0, 1.0) for side in SIDES))
    for target in (-5.0, -0.5, 0.5, 5.0):
        check_clipped_value_loss(bounds, torch.zeros(4).double(), torch.full_like(bounds, target), 1.0)
    beyond = t(*(2 + side for side in SIDES))
    found = check_clipped_value_loss(beyond, t(0, 0), t(1.5, 1.5), 1.0)
    assert (found == 0).tolist() == [True, False]


@SEEDS
@pytest.mark.parametrize("delta", [0.3, 1.0, 2.0])
def test_huber_value_loss(delta: float, seed: int) -> None:
    values, returns = normal(2, 5, 7, seed=seed)
    values = torch.cat([values, returns[:2] + t(-delta, delta)[:, None] + 1e-6, returns[:2] - delta - 1e-6])
    returns = torch.cat([returns, returns[:2], returns[:2]])
    found = derivatives.huber_value_loss(values, returns, delta=delta)
    assert_same(found, by_autograd(lambda x: value.huber_value_loss(x, returns, delta=delta), values))
    assert found.abs().max() == delta


PARTS = [("logprobs",), ("entropy",), ("kl",), ("logprobs", "entropy", "kl")]


def weights_of(parts: tuple[str, ...], *shape: int) -> dict[str, Tensor | None]:
    """Derivatives of a loss by log-probs, entropy and KL: any, of each row its own; None of what isn't part of it."""
    some = dict(zip(("logprobs", "entropy", "kl"), normal(3, *shape, seed=7), strict=True))
    by = {f"by_{name}": weight if name in parts else None for name, weight in some.items()}
    return by | {"by_logprobs": some["logprobs"] * ("logprobs" in parts)}


def weighed(by: dict[str, Tensor | None], logprobs: Tensor, entropies: Tensor, kl: Tensor) -> Tensor:
    values = {"by_logprobs": logprobs, "by_entropy": entropies, "by_kl": kl}
    return sum(((by[name] * values[name]).sum() for name in by if by[name] is not None), torch.zeros(()))


@pytest.mark.parametrize("parts", PARTS)
def test_softmax(parts: tuple[str, ...]) -> None:
    logits, old = normal(2, 3, 5, 4, seed=0)
    targets = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(1))
    by, old_logprobs = weights_of(parts, 3, 5), old.log_softmax(-1)
    found = derivatives.softmax(logits.log_softmax(-1), targets, **by, old_logprobs=old_logprobs)

    def loss(z: Tensor) -> Tensor:
        kl = categorical_kl(old_logprobs, z.log_softmax(-1))
        return weighed(by, token_logprobs(z, targets), entropy(z), kl)

    assert_same(found, by_autograd(loss, logits))


def test_softmax_golden() -> None:
    """p = (¼, ¾): towards the first, 1 − p; the entropy's derivative is −p·(log p + H)."""
    logprobs, one = t(0.25, 0.75).log(), torch.tensor(1.0, dtype=torch.float64)
    found = derivatives.softmax(logprobs, torch.tensor(0), by_logprobs=one)
    torch.testing.assert_close(found, t(0.75, -0.75))
    found = derivatives.softmax(logprobs, torch.tensor(0), by_logprobs=0 * one, by_entropy=one)
    pull = 0.25 * 0.75 * math.log(3)  # towards even odds
    torch.testing.assert_close(found, t(pull, -pull))
    even = t(0.5, 0.5).log()
    found = derivatives.softmax(logprobs, torch.tensor(0), by_logprobs=0 * one, by_kl=one, old_logprobs=even)
    torch.testing.assert_close(found, t(-0.25, 0.25))


@pytest.mark.parametrize("rows", [5, 1], ids=["a spread each", "one spread for all"])
@pytest.mark.parametrize("parts", PARTS)
def test_gaussian(parts: tuple[str, ...], rows: int) -> None:
    mean, old_mean, values = normal(3, 2, 5, 4, seed=0)
    log_std, old_log_std = 0.5 * normal(2, 2, rows, 4, seed=1)
    by = weights_of(parts, 2, 5)
    found = derivatives.gaussian(mean, log_std, values, **by, old=(old_mean, old_log_std))

    def loss(mean: Tensor, log_std: Tensor) -> Tensor:
        kl = gaussian_kl(old_mean, old_log_std, mean, log_std)
        return weighed(by, gaussian_logprobs(mean, log_std, values), gaussian_entropy(log_std).expand(2, 5), kl)

    assert_same(found[0], by_autograd(lambda x: loss(x, log_std) + 0 * x.sum(), mean))
    assert_same(found[1], by_autograd(lambda x: loss(mean, x) + 0 * x.sum(), log_std))


def apart(one: float, other: float) -> bool:
    """Whether a loss has one branch there in floating point too."""
    return abs(one - other) > 1e-9


@given(numbers, numbers, numbers, sizes)
def test_value_losses_anywhere(at: float, old: float, target: float, size: float) -> None:
    values, old_values, returns = t(at), t(old), t(target)
    assert_same(
        derivatives.huber_value_loss(values, returns, delta=size),
        by_autograd(lambda x: value.huber_value_loss(x, returns, delta=size), values),
    )
    near = old + min(max(at - old, -size), size)
    if apart(abs(at - old), size) and (abs(at - old) < size or apart(abs(near - target), abs(at - target))):
        check_clipped_value_loss(values, old_values, returns, size)


@given(st.floats(-3, 3), numbers, st.floats(0, 1), sizes)
def test_clipped_surrogate_anywhere(log_ratio: float, advantage: float, low: float, high: float) -> None:
    ratio = math.exp(log_ratio)
    if apart(ratio, 1 - low) and apart(ratio, 1 + high):
        check_clipped_surrogate(t(ratio), t(advantage), low, high)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="clip must not be negative"):
        derivatives.clipped_value_loss(t(0), t(0), t(0), clip=-1.0)
    with pytest.raises(ValueError, match="by_kl needs old_logprobs"):
        derivatives.softmax(t(0, 0), torch.tensor(0), by_logprobs=t(0)[0], by_kl=t(0)[0])
    with pytest.raises(ValueError, match="by_kl needs old"):
        derivatives.gaussian(t(0), t(0), t(0), by_logprobs=t(0)[0], by_kl=t(0)[0])
    for delta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="delta must be positive"):
            derivatives.huber_value_loss(t(0), t(0), delta=delta)
    for low, high in ((-0.1, 0.2), (1.1, 0.2), (0.2, -0.1)):
        with pytest.raises(ValueError, match="clip_low"):
            derivatives.clipped_surrogate(t(1), t(1), clip_low=low, clip_high=high)
