"""Returns: goldens worked out by hand, the defining recursion, identities, masks, and exact expectations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trueup.mdp import enumerate_trajectories
from trueup.mdp.exact import values as exact_values
from trueup.mdp.generators import random_mdp
from trueup.objectives.returns import (
    discounted_returns,
    discounts_from,
    elapsed_discounts,
    lambda_returns,
    n_step_returns,
    next_values,
    reverse_scan,
)


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def b(*flags: int) -> Tensor:
    return torch.tensor(flags, dtype=torch.bool)


REWARDS, NEXT_VALUES, HALF = t(1, 2, 3), t(4, 6, 8), t(0.5, 0.5, 0.5)


def test_discounted_returns_golden() -> None:
    # 3 + ½·8 = 7, 2 + ½·7 = 5.5, 1 + ½·5.5 = 3.75
    assert discounted_returns(REWARDS, HALF, NEXT_VALUES).tolist() == [3.75, 5.5, 7.0]
    assert discounted_returns(REWARDS, HALF).tolist() == [2.75, 3.5, 3.0]


def test_lambda_returns_golden() -> None:
    # G_2 = 3 + ½·8; G_1 = 2 + ½(½·6 + ½·7); G_0 = 1 + ½(½·4 + ½·5.25)
    assert lambda_returns(REWARDS, HALF, NEXT_VALUES, lambda_=0.5).tolist() == [3.3125, 5.25, 7.0]


def test_n_step_returns_golden() -> None:
    # one step: r + ½V; two steps: 1 + ½·2 + ¼·6, 2 + ½·3 + ¼·8, and only one is left for the last
    assert n_step_returns(REWARDS, HALF, NEXT_VALUES, num_steps=1).tolist() == [3.0, 5.0, 7.0]
    assert n_step_returns(REWARDS, HALF, NEXT_VALUES, num_steps=2).tolist() == [3.5, 5.5, 7.0]


def test_truncation_keeps_the_bootstrap_and_cuts_the_recursion() -> None:
    """Two episodes in one row: the first is cut by a time limit after step 1, the second terminates at step 3."""
    rewards, values = t(1, 2, 3, 4), t(0, 10, 0, 99)
    discounts = discounts_from(b(0, 0, 0, 1), 0.5, dtype=torch.float64)
    truncated = b(0, 1, 0, 0)
    # 4; 3 + ½·4; 2 + ½·10; 1 + ½·7: the second episode's 5 must not flow into step 1, its value 99 not into step 3
    expected = [4.5, 7.0, 5.0, 4.0]
    assert discounted_returns(rewards, discounts, values, truncated=truncated).tolist() == expected
    assert lambda_returns(rewards, discounts, values, lambda_=1.0, truncated=truncated).tolist() == expected
    assert n_step_returns(rewards, discounts, values, num_steps=9, truncated=truncated).tolist() == expected


def test_termination_is_not_truncation() -> None:
    """The same row, with step 1 terminating: there is nothing to bootstrap from."""
    discounts = discounts_from(b(0, 1, 0, 1), 0.5, dtype=torch.float64)
    assert discounted_returns(t(1, 2, 3, 4), discounts, t(0, 10, 0, 99)).tolist() == [2.0, 2.0, 5.0, 4.0]


def test_masked_gap_is_bridged() -> None:
    """A tool's tokens in the middle: no discount for them, nothing read there, the same returns as without them."""
    nan = math.nan
    rewards, values = t(1, nan, nan, 2, 3, nan), t(4, nan, nan, 6, 8, nan)
    discounts, mask = t(0.5, nan, nan, 0.5, 0.5, nan), b(1, 0, 0, 1, 1, 0)
    truncated = b(0, 1, 0, 0, 0, 1)  # flags on masked entries aren't steps either
    arguments = {"truncated": truncated, "mask": mask}
    assert discounted_returns(rewards, discounts, values, **arguments).tolist() == [3.75, 0, 0, 5.5, 7, 0]
    assert lambda_returns(rewards, discounts, values, lambda_=0.5, **arguments).tolist() == [3.3125, 0, 0, 5.25, 7, 0]
    assert n_step_returns(rewards, discounts, values, num_steps=2, **arguments).tolist() == [3.5, 0, 0, 5.5, 7, 0]


def test_next_values_golden() -> None:
    assert next_values(t(1, 2, 3), torch.tensor(7.0, dtype=torch.float64)).tolist() == [2, 3, 7]
    assert next_values(t(1, 2, 3)).tolist() == [2, 3, 0]
    # The value after a step is that of the next step taken, beyond the gap; the bootstrap follows the last step.
    gap = next_values(t(1, math.nan, 3, math.nan), torch.tensor(7.0, dtype=torch.float64), b(1, 0, 1, 0))
    assert gap.tolist() == [3, 0, 7, 0]


def test_elapsed_discounts_golden() -> None:
    ended, mask = b(0, 0, 1, 0, 0, 0), b(1, 1, 1, 0, 1, 1)
    assert elapsed_discounts(ended, 0.5, mask, dtype=torch.float64).tolist() == [1, 0.5, 0.25, 0, 1, 0.5]
    assert elapsed_discounts(b(0, 0, 0), 0.0).tolist() == [1, 0, 0]
    assert elapsed_discounts(b(0, 0, 0), 1.0).tolist() == [1, 1, 1]
    # an end that is masked is no step, so it ends nothing
    assert elapsed_discounts(b(0, 1, 0), 0.5, b(1, 0, 1)).tolist() == [1, 0, 0.5]


def recording(seed: int) -> dict[str, Tensor]:
    """Random rows with terminations, truncations, gaps and padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, 11)
    flags = torch.rand((3, *shape), generator=generator)
    return {
        "rewards": torch.randn(shape, generator=generator, dtype=torch.float64),
        "discounts": discounts_from(flags[0] < 0.1, 0.9, dtype=torch.float64),
        "next_values": torch.randn(shape, generator=generator, dtype=torch.float64),
        "truncated": flags[1] < 0.15,
        "mask": flags[2] < 0.75,
    }


def by_recursion(
    rewards: Tensor, discounts: Tensor, next_values: Tensor, truncated: Tensor, mask: Tensor, lambda_: float
):
    """The definition, one step at a time."""
    result = torch.zeros_like(rewards)
    for row in np.ndindex(*rewards.shape[:-1]):
        following = None
        for i in reversed(range(rewards.shape[-1])):
            at = (*row, i)
            if not mask[at]:
                continue
            ahead = next_values[at]
            if following is not None and not truncated[at]:
                ahead = (1 - lambda_) * ahead + lambda_ * following
            following = result[at] = rewards[at] + discounts[at] * ahead
    return result


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
def test_lambda_returns_solve_their_recursion(seed: int, lambda_: float) -> None:
    data = recording(seed)
    expected = by_recursion(**data, lambda_=lambda_)
    torch.testing.assert_close(lambda_returns(**data, lambda_=lambda_), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_identities(seed: int) -> None:
    """n-step(T) = λ-return at 1 = bootstrapped return; n-step(1) = λ-return at 0; λ = the weighted n-step returns."""
    data = recording(seed)
    steps = data["rewards"].shape[-1]
    full = lambda_returns(**data, lambda_=1.0)
    close = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(n_step_returns(**data, num_steps=steps), full, **close)
    torch.testing.assert_close(discounted_returns(**data), full, **close)
    one_step = lambda_returns(**data, lambda_=0.0)
    torch.testing.assert_close(n_step_returns(**data, num_steps=1), one_step, **close)
    # (1−λ) Σ_{n<T} λ^{n−1} G^{(n)} + λ^{T−1} G^{(T)}: the definition that the recursion stands for
    lam = 0.6
    mixture = lam ** (steps - 1) * full
    for n in range(1, steps):
        mixture = mixture + (1 - lam) * lam ** (n - 1) * n_step_returns(**data, num_steps=n)
    torch.testing.assert_close(lambda_returns(**data, lambda_=lam), mixture, **close)


@pytest.mark.parametrize("seed", range(3))
def test_padding_rows_and_shapes_do_not_matter(seed: int) -> None:
    """[T], [N, T] and [A, B, T] are one function; padding left or right and other rows change nothing."""
    data = recording(seed)
    expected = lambda_returns(**data, lambda_=0.7)
    flat = {name: x.flatten(0, 1) for name, x in data.items()}
    torch.testing.assert_close(lambda_returns(**flat, lambda_=0.7), expected.flatten(0, 1), rtol=0, atol=0)
    single = {name: x[2, 1] for name, x in data.items()}
    torch.testing.assert_close(lambda_returns(**single, lambda_=0.7), expected[2, 1], rtol=0, atol=0)
    padded = {
        name: torch.nn.functional.pad(x, (2, 5), value=0 if x.dtype == torch.bool else math.nan)
        for name, x in data.items()
    }
    inside = lambda_returns(**padded, lambda_=0.7)[..., 2:-5]
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-13)


def test_reverse_scan() -> None:
    # x_2 = 3, x_1 = 2 + 10·3, x_0 = 1 + 100·32
    assert reverse_scan(t(1, 2, 3), t(100, 10, 7)).tolist() == [3201, 32, 3]
    inputs = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    decays = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 6) < 0.7
    assert torch.autograd.gradcheck(lambda x, d: reverse_scan(x, d, mask), (inputs, decays))


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_with_true_values_every_return_has_the_value_as_its_mean(lambda_: float) -> None:
    """Over all trajectories of an endless process, cut at a horizon: E[G_t | s_t = s] = V(s), for any λ and n."""
    mdp = random_mdp(3, num_states=3, num_actions=2, gamma=0.9, episodic=False)
    policy = np.random.default_rng(0).dirichlet(np.ones(2), size=3)
    paths = enumerate_trajectories(mdp, policy, horizon=4)
    value = exact_values(mdp, policy)
    assert paths.truncated[:, -1].all()
    data = {
        "rewards": torch.tensor(paths.rewards),
        "discounts": discounts_from(torch.tensor(paths.terminated), mdp.gamma, dtype=torch.float64),
        "next_values": torch.tensor(value[paths.next_states]),
        "truncated": torch.tensor(paths.truncated),
        "mask": torch.tensor(paths.mask),
    }
    for returns in (lambda_returns(**data, lambda_=lambda_), n_step_returns(**data, num_steps=1 + int(4 * lambda_))):
        for step in range(4):
            for state in range(3):
                chosen = paths.states[:, step] == state
                weights = paths.probabilities * chosen
                mean = (weights * returns[:, step].numpy()).sum() / weights.sum()
                assert mean == pytest.approx(value[state], abs=1e-10)
    # Without the bootstrap of the truncated step the mean is off: what `done` would have done.
    forgotten = discounted_returns(data["rewards"], data["discounts"], mask=data["mask"])[:, 0].numpy()
    assert abs(paths.probabilities @ forgotten - mdp.start @ value) > 1e-2


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        n_step_returns(REWARDS, HALF, NEXT_VALUES, num_steps=0)
    with pytest.raises(ValueError, match=r"^lambda_ has to lie"):
        lambda_returns(REWARDS, HALF, NEXT_VALUES, lambda_=1.5)
    with pytest.raises(ValueError, match=r"^gamma has to lie"):
        discounts_from(b(0), -0.1)
    with pytest.raises(ValueError, match=r"^gamma has to lie"):
        elapsed_discounts(b(0), 1.1)
