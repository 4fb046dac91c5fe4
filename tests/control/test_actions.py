"""Action spaces against PyTorch's distributions, their derivatives against autograd, samples by their statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy import stats
from scipy.special import softmax
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from trueup.control.actions import ActionSpace, Choices, Gaussian, Parameters, action_space
from trueup.errors import DataError

ONE = Choices((3,), (0,), single=True)
SEVERAL = Choices((3, 2, 4), (0, 0, 0), single=False)
REAL = Gaussian(np.array([-1.0, -2.0], np.float32), np.array([1.0, 0.5], np.float32), (2,))
SPACES = pytest.mark.parametrize("space", [ONE, SEVERAL, REAL], ids=["one", "several", "real"])
RUNS, BATCH = 2, 5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_of(space: ActionSpace, seed: int) -> tuple[Tensor, ...]:
    """Outputs of a network, and log σ where there is one."""
    outputs = normal(RUNS, BATCH, space.num_outputs, seed=seed)
    return (outputs, 0.5 * normal(RUNS, 1, space.size, seed=seed + 100)) if space.has_spread else (outputs,)


def parameters_of(space: ActionSpace, seed: int) -> Parameters:
    return space.parameters(*outputs_of(space, seed))


def actions_of(space: ActionSpace, seed: int) -> Tensor:
    """Any actions, as they are stored: as floats."""
    if isinstance(space, Gaussian):
        return 2 * normal(RUNS, BATCH, space.size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(n, (RUNS, BATCH), generator=generator) for n in space.sizes], -1).double()


def distributions(space: ActionSpace, parameters: Parameters) -> list:
    """PyTorch's own, one for each choice."""
    if isinstance(space, Gaussian):
        mean, log_std = parameters
        return [Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)]
    return [Categorical(logits=logits) for logits in parameters[0].split(list(space.sizes), -1)]


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_goldens() -> None:
    """π = (¼, ¾) with a coin beside it. Of the normal distribution: ``tests/objectives/test_gaussian.py``."""
    coin = Choices((2, 2), (0, 0), single=False)
    logits = torch.tensor([[0.0, math.log(3), 5.0, 5.0]], dtype=torch.float64)
    at = coin.parameters(logits)
    assert coin.logprobs(at, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(math.log(3 / 8))
    assert coin.entropy(at).item() == pytest.approx(math.log(4) - 0.75 * math.log(3) + math.log(2))
    flat = coin.parameters(torch.zeros_like(logits))
    assert coin.kl(flat, at).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


@SPACES
@pytest.mark.parametrize("seed", range(3))
def test_logprobs_entropy_and_kl_are_those_of_torch(space: ActionSpace, seed: int) -> None:
    parameters, old, actions = parameters_of(space, seed), parameters_of(space, seed + 10), actions_of(space, seed)
    each, each_old = distributions(space, parameters), distributions(space, old)
    taken = [actions] if isinstance(space, Gaussian) else list(actions.unbind(-1))
    logprobs = torch.stack([one.log_prob(action) for one, action in zip(each, taken, strict=True)]).sum(0)
    assert_same(space.logprobs(parameters, actions), logprobs)
    assert_same(space.entropy(parameters), torch.stack([one.entropy() for one in each]).sum(0))
    kl = torch.stack([kl_divergence(one_old, one) for one_old, one in zip(each_old, each, strict=True)]).sum(0)
    assert_same(space.kl(old, parameters), kl)
    assert_same(space.kl(parameters, parameters), torch.zeros_like(kl))


@SPACES
@pytest.mark.parametrize("parts", [("logprobs",), ("entropy",), ("kl",), ("logprobs", "entropy", "kl")])
def test_derivatives_are_autograds(space: ActionSpace, parts: tuple[str, ...]) -> None:
    """Of a weighted sum of log-probs, entropies and KLs, each state with weights of its own."""
    outputs = tuple(x.requires_grad_() for x in outputs_of(space, 0))
    parameters = space.parameters(*outputs)
    old, actions = parameters_of(space, 1), actions_of(space, 0)
    weights = {name: normal(RUNS, BATCH, seed=7 + index) for index, name in enumerate(("logprobs", "entropy", "kl"))}
    values = {
        "logprobs": space.logprobs(parameters, actions),
        "entropy": space.entropy(parameters),
        "kl": space.kl(old, parameters),
    }
    loss = sum((weights[name] * values[name]).sum() for name in parts)
    expected = torch.autograd.grad(loss, outputs, allow_unused=True)
    with torch.no_grad():
        found = space.derivatives(
            parameters,
            actions,
            by_logprobs=weights["logprobs"] * ("logprobs" in parts),
            by_entropy=weights["entropy"] if "entropy" in parts else None,
            by_kl=weights["kl"] if "kl" in parts else None,
            old=old,
        )
    assert len(found) == len(outputs)
    for output, one, other in zip(outputs, found, expected, strict=True):
        assert one.shape == output.shape
        assert_same(one, torch.zeros_like(one) if other is None else other)


def test_the_old_spread_may_be_another_one_in_every_state() -> None:
    """Derivatives of the KL from a Gaussian whose old parameters have a row for each state."""
    mean, log_std = (x.requires_grad_() for x in parameters_of(REAL, 0))
    old = normal(RUNS, BATCH, 2, seed=3), normal(RUNS, BATCH, 2, seed=4)
    expected = torch.autograd.grad(REAL.kl(old, (mean, log_std)).sum(), (mean, log_std))
    ones = torch.ones(RUNS, BATCH, dtype=torch.float64)
    found = REAL.derivatives((mean, log_std), actions_of(REAL, 0), by_logprobs=0 * ones, by_kl=ones, old=old)
    for one, other in zip(found, expected, strict=True):
        assert_same(one.detach(), other)


def test_sampled_choices_come_as_often_as_they_are_probable() -> None:
    """χ² of each choice, and of pairs: the choices are independent. p-values of 1 in 1000 fail."""
    number = 40_000
    logits = normal(SEVERAL.num_outputs, seed=0).numpy()
    noise = SEVERAL.noise(np.random.default_rng(0), (number,))
    assert noise.shape == (number, SEVERAL.num_outputs)
    drawn = SEVERAL.act(np.broadcast_to(logits, noise.shape), noise)
    assert drawn.shape == (number, 3)
    probabilities = [softmax(logits[part]) for part in SEVERAL.parts]
    for index, expected in enumerate(probabilities):
        counts = np.bincount(drawn[:, index], minlength=len(expected))
        assert stats.chisquare(counts, number * expected).pvalue > 1e-3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pairs = np.zeros((SEVERAL.sizes[one], SEVERAL.sizes[other]))
        np.add.at(pairs, (drawn[:, one], drawn[:, other]), 1)
        expected = number * np.outer(probabilities[one], probabilities[other])
        assert stats.chisquare(pairs.ravel(), expected.ravel()).pvalue > 1e-3


def test_one_sampled_choice_comes_as_often_as_it_is_probable() -> None:
    number = 40_000
    logits = np.array([0.3, -1.0, 1.2])
    drawn = ONE.act(np.broadcast_to(logits, (number, 3)), ONE.noise(np.random.default_rng(1), (number,)))
    assert drawn.shape == (number, 1)
    counts = np.bincount(drawn[:, 0], minlength=3)
    assert stats.chisquare(counts, number * softmax(logits)).pvalue > 1e-3


def test_sampled_numbers_have_their_mean_spread_and_shape() -> None:
    """Within four standard errors; Kolmogorov–Smirnov; and no correlation between the two."""
    number = 40_000
    mean, log_std = np.array([0.5, -2.0], np.float32), np.log(np.array([[0.5, 3.0]], np.float32))
    noise = REAL.noise(np.random.default_rng(0), (number,))
    assert noise.shape == (number, 2)
    drawn = REAL.act(np.broadcast_to(mean, (number, 2)), noise, log_std)
    std = np.exp(log_std[0])
    assert (np.abs(drawn.mean(0) - mean) < 4 * std / math.sqrt(number)).all()
    # the variance of a sample variance of normal numbers is 2σ⁴/(n − 1)
    assert (np.abs(drawn.var(0, ddof=1) - std**2) < 4 * std**2 * math.sqrt(2 / (number - 1))).all()
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 4 / math.sqrt(number)
    for index in range(2):
        assert stats.kstest(drawn[:, index], stats.norm(mean[index], std[index]).cdf).pvalue > 1e-3


def test_without_noise_the_most_probable_action() -> None:
    outputs = np.array([[[0.1, 2.0, -1.0], [3.0, 2.0, 1.0]]], np.float32)
    assert ONE.act(outputs, None).tolist() == [[[1], [0]]]
    outputs = np.array([[[0.1, 2.0, -1.0, 4.0, 3.0, 0.0, 1.0, 9.0, 2.0]]], np.float32)
    assert SEVERAL.act(outputs, None).tolist() == [[[1, 0, 2]]]
    mean = np.array([[[0.1, 5.0]]], np.float32)
    np.testing.assert_array_equal(REAL.act(mean, None, np.zeros((1, 1, 2), np.float32)), mean)


def test_the_same_generator_draws_the_same_noise() -> None:
    for space in (ONE, SEVERAL, REAL):
        first, again = (space.noise(np.random.default_rng(5), (4, 2)) for _ in range(2))
        assert first.dtype == np.float32
        np.testing.assert_array_equal(first, again)


def test_the_environment_counts_from_where_it_starts() -> None:
    space = action_space(spaces.Discrete(3, start=-1))
    given = space.for_environment(np.array([[0.0], [2.0]], np.float32))
    assert given.tolist() == [-1, 1]
    assert np.issubdtype(given.dtype, np.integer)
    several = action_space(spaces.MultiDiscrete([3, 2], start=[1, 10]))
    given = several.for_environment(np.array([[2, 0], [0, 1]]))
    assert given.tolist() == [[3, 10], [1, 11]]
    assert np.issubdtype(given.dtype, np.integer)
    assert action_space(spaces.MultiDiscrete([4])).for_environment(np.array([[3]])).tolist() == [[3]]


def test_the_environment_gets_numbers_within_its_bounds() -> None:
    drawn = np.array([[-3.0, -3.0], [0.25, 0.25], [3.0, 3.0]], np.float32)
    assert REAL.for_environment(drawn).tolist() == [[-1, -2], [0.25, 0.25], [1, 0.5]]
    assert drawn[0].tolist() == [-3, -3]  # what is stored stays as it was drawn
    unbounded = action_space(spaces.Box(-np.inf, np.inf, (2,)))
    np.testing.assert_array_equal(unbounded.for_environment(drawn), drawn)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3)])
def test_the_environment_gets_its_own_shape(shape: tuple[int, ...]) -> None:
    box = spaces.Box(-1.0, 1.0, shape)
    space = action_space(box)
    size = int(np.prod(shape))
    assert (space.size, space.num_outputs) == (size, size)
    given = space.for_environment(np.linspace(-2, 2, 4 * size, dtype=np.float32).reshape(4, size))
    assert given.shape == (4, *shape)
    assert all(box.contains(np.asarray(one, np.float32)) for one in given)
    assert given.ravel().tolist() == pytest.approx(np.linspace(-2, 2, 4 * size).clip(-1, 1).tolist())


def test_action_spaces_of_gymnasium() -> None:
    assert action_space(spaces.Discrete(4, start=2)) == Choices((4,), (2,), single=True)
    assert action_space(spaces.MultiDiscrete([3, 2, 4])) == SEVERAL
    assert (SEVERAL.num_outputs, SEVERAL.size, SEVERAL.has_spread) == (9, 3, False)
    assert SEVERAL.parts == (slice(0, 3), slice(3, 5), slice(5, 9))
    box = action_space(spaces.Box(np.array([-1, -2], np.float32), np.array([1, 0.5], np.float32)))
    assert isinstance(box, Gaussian)
    assert (box.low.tolist(), box.high.tolist(), box.shape, box.has_spread) == ([-1, -2], [1, 0.5], (2,), True)


@pytest.mark.parametrize(
    "space",
    [
        spaces.MultiBinary(3),
        spaces.Box(0, 255, (2,), np.uint8),
        spaces.MultiDiscrete([[2, 3], [2, 3]]),
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Dict(a=spaces.Discrete(2)),
    ],
    ids=lambda space: type(space).__name__,
)
def test_other_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises(DataError, match=r"(?s)actions are .*Discrete, MultiDiscrete \(one row\) and Box of floats"):
        action_space(space)
