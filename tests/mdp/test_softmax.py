"""The exact gradients: closed form = autograd through the linear system = finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trueup.errors import DataError
from trueup.mdp import exact
from trueup.mdp.generators import random_mdp
from trueup.mdp.softmax import dropped_discount_gradient, expected_return, policy_gradient, softmax_policy


@pytest.mark.parametrize(("gamma", "episodic"), [(0.9, False), (0.8, True), (1.0, True), (0.0, False)])
@pytest.mark.parametrize("seed", range(2))
def test_policy_gradient_theorem(seed: int, gamma: float, episodic: bool) -> None:
    mdp = random_mdp(seed, num_states=4, num_actions=3, gamma=gamma, episodic=episodic)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    value = expected_return(mdp, logits)
    assert value.item() == pytest.approx(exact.expected_return(mdp, softmax_policy(logits)), abs=1e-12)
    (autograd,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(policy_gradient(mdp, logits), autograd, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: expected_return(mdp, x), logits)


def test_gradient_through_shared_parameters() -> None:
    """Logits from features: the chain rule on the closed form equals autograd all the way."""
    mdp = random_mdp(0, num_states=4, num_actions=3, gamma=0.9, episodic=False)
    features = torch.randn(4, 3, 2, dtype=torch.float64)
    weights = torch.randn(2, dtype=torch.float64, requires_grad=True)
    (autograd,) = torch.autograd.grad(expected_return(mdp, features @ weights), weights)
    by_hand = torch.einsum("saf,sa->f", features, policy_gradient(mdp, features @ weights))
    torch.testing.assert_close(autograd, by_hand, rtol=0, atol=1e-12)


def test_dropped_discount_gradient() -> None:
    """The gradient itself at γ = 1, another direction below, undefined for episodes that never end."""
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    undiscounted = random_mdp(2, num_states=4, num_actions=2, gamma=1.0, episodic=True)
    torch.testing.assert_close(dropped_discount_gradient(undiscounted, logits), policy_gradient(undiscounted, logits))
    discounted = random_mdp(2, num_states=4, num_actions=2, gamma=0.5, episodic=True)
    exact, dropped = policy_gradient(discounted, logits), dropped_discount_gradient(discounted, logits)
    assert (exact - dropped).norm() > 0.1 * exact.norm()
    # state by state they are parallel: η(s)/d_γ(s) ≥ 1
    factors = (dropped / exact)[:3]
    np.testing.assert_allclose(factors[:, 0], factors[:, 1])
    assert (factors >= 1 - 1e-12).all()
    with pytest.raises(DataError, match="never ends"):
        dropped_discount_gradient(random_mdp(0, num_states=3, num_actions=2, gamma=0.9, episodic=False), logits[:3])


def test_it_is_no_gradient_of_anything() -> None:
    """The dropped-discount field has a Jacobian that isn't symmetric; that of ∇J is."""
    mdp = random_mdp(4, num_states=4, num_actions=2, gamma=0.5, episodic=True)
    logits = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def asymmetry(field) -> float:
        step = 1e-5
        columns = []
        for direction in torch.eye(8, dtype=torch.float64) * step:
            ahead, behind = field(mdp, (logits + direction).view(4, 2)), field(mdp, (logits - direction).view(4, 2))
            columns.append(((ahead - behind) / (2 * step)).flatten())
        jacobian = torch.stack(columns, -1)
        return (jacobian - jacobian.T).abs().max().item()

    assert asymmetry(policy_gradient) < 1e-8
    assert asymmetry(dropped_discount_gradient) > 1e-3


def test_float32_is_refused() -> None:
    mdp = random_mdp(0, num_states=3, num_actions=2, gamma=0.9, episodic=False)
    with pytest.raises(DataError, match="float64"):
        expected_return(mdp, torch.zeros(3, 2))
