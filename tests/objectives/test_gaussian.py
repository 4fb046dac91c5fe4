"""Normal distributions: goldens, PyTorch's own, and integrals over the density."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from trueup.objectives.gaussian import gaussian_entropy, gaussian_kl, gaussian_logprobs


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_golden() -> None:
    """N(1, 2²) at 3, one standard deviation off; two of them are twice as much."""
    mean, log_std, at = t(1), t(math.log(2)), t(3)
    one = -0.5 - math.log(2) - 0.5 * math.log(2 * math.pi)
    assert gaussian_logprobs(mean, log_std, at).item() == pytest.approx(one)
    assert gaussian_logprobs(mean.repeat(2), log_std.repeat(2), at.repeat(2)).item() == pytest.approx(2 * one)
    assert gaussian_entropy(log_std).item() == pytest.approx(math.log(2) + 0.5 * math.log(2 * math.pi * math.e))
    assert gaussian_kl(t(0), t(0), mean, log_std).item() == pytest.approx(math.log(2) + (1 + 1) / 8 - 0.5)
    assert gaussian_kl(mean, log_std, t(0), t(0)).item() == pytest.approx(-math.log(2) + (4 + 1) / 2 - 0.5)


@pytest.mark.parametrize("rows", [5, 1], ids=["a spread each", "one spread for all"])
def test_pytorchs_distributions_agree(rows: int) -> None:
    mean, other_mean, values = normal(3, 5, 4, seed=0)
    log_std, other_log_std = 0.5 * normal(2, rows, 4, seed=1)
    one, other = (
        Independent(Normal(m, s.exp().expand_as(m)), 1) for m, s in ((mean, log_std), (other_mean, other_log_std))
    )
    torch.testing.assert_close(gaussian_logprobs(mean, log_std, values), one.log_prob(values), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gaussian_entropy(log_std).expand(5), one.entropy(), rtol=1e-12, atol=1e-12)
    kl = gaussian_kl(mean, log_std, other_mean, other_log_std)
    torch.testing.assert_close(kl, kl_divergence(one, other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_integrals_over_the_density(seed: int) -> None:
    """∫p = 1, ∫−p·log p = H, ∫p·log(p/q) = KL."""
    mean, log_std, other_mean, other_log_std = (0.7 * normal(4, seed=seed)).unsqueeze(-1)

    def logs(x: float) -> tuple[float, float]:
        at = t(x)
        return gaussian_logprobs(mean, log_std, at).item(), gaussian_logprobs(other_mean, other_log_std, at).item()

    ends = (mean - 12 * log_std.exp()).item(), (mean + 12 * log_std.exp()).item()
    mass, entropy, kl = (
        quad(f, *ends, epsabs=1e-10)[0]
        for f in (
            lambda x: np.exp(logs(x)[0]),
            lambda x: -np.exp(logs(x)[0]) * logs(x)[0],
            lambda x: np.exp(logs(x)[0]) * (logs(x)[0] - logs(x)[1]),
        )
    )
    assert mass == pytest.approx(1, abs=1e-8)
    assert entropy == pytest.approx(gaussian_entropy(log_std).item(), abs=1e-8)
    assert kl == pytest.approx(gaussian_kl(mean, log_std, other_mean, other_log_std).item(), abs=1e-8)
    assert gaussian_kl(mean, log_std, mean, log_std).item() == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="values has the shape"):
        gaussian_logprobs.__wrapped__(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 3))
    for function, others in ((gaussian_logprobs, [torch.zeros(2, 3)]), (gaussian_kl, [torch.zeros(2, 3)] * 2)):
        with pytest.raises(ValueError, match="log_std has the shape"):
            function.__wrapped__(torch.zeros(2, 3), torch.zeros(2, 1), *others)
    with pytest.raises(ValueError, match="other_mean has the shape"):
        gaussian_kl.__wrapped__(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, 3))
