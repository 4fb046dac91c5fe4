"""A softmax policy on a tabular process: its exact return as a function of the logits, and both gradients. Torch."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trueup.errors import DataError
from trueup.mdp import exact
from trueup.mdp.tabular import Policy, TabularMDP


def softmax_policy(logits: Float[Tensor, "s a"]) -> Policy:
    """π(a|s) = softmax of the state's logits, as a NumPy float64 array for the functions of ``exact``."""
    return torch.softmax(logits.detach().double(), -1).cpu().numpy()


def expected_return(mdp: TabularMDP, logits: Float[Tensor, "s a"]) -> Float[Tensor, ""]:
    """J(θ) = ρᵀ (I − γ·P_θ)⁻¹ R_θ, differentiable: the exact gradient, whatever parameters the logits come from.

    ``logits`` [S, A] float64. Raises ``DataError`` for another type, or as ``exact.values``.
    """
    if logits.dtype != torch.float64:
        raise DataError(f"the logits are {logits.dtype}", way_out="exact means float64: use logits.double()")
    exact.expected_return(mdp, softmax_policy(logits))  # refuses what has no finite return
    transitions, rewards, start = (torch.tensor(x) for x in (mdp.transition_array, mdp.expected_rewards, mdp.start))
    policy = torch.softmax(logits, -1)
    chain = torch.einsum("sa,sat->st", policy, transitions)
    identity = torch.eye(mdp.num_states, dtype=torch.float64)
    return start @ torch.linalg.solve(identity - mdp.gamma * chain, (policy * rewards).sum(-1))


def policy_gradient(mdp: TabularMDP, logits: Float[Tensor, "s a"]) -> Float[Tensor, "s a"]:
    """∇J_γ with respect to the logits of a tabular softmax policy, in closed form.

        ∂J/∂θ(s,a) = d_γ(s) · π(a|s) · A(s,a),    d_γ(s) = Σ_t γ^t Pr(s_t = s)

    What REINFORCE estimates *with* γ^t in front of ∇log π. Raises as ``exact.values``.
    Source: Sutton et al. 2000 (policy gradient theorem), written out for softmax as in Agarwal et al. 2021.
    """
    return _visited_advantages(mdp, logits, discounted=True)


def dropped_discount_gradient(mdp: TabularMDP, logits: Float[Tensor, "s a"]) -> Float[Tensor, "s a"]:
    """What REINFORCE estimates *without* γ^t, from discounted returns-to-go. Not ∇J_γ unless γ = 1.

        η(s) · π(a|s) · A_γ(s,a),    η(s) = Σ_t Pr(s_t = s)

    States count by how often they are visited, not by how soon; it isn't the gradient of any function. Defined for
    episodes that end. Raises as ``exact.occupancy`` undiscounted.
    Source: Thomas 2014 ("Bias in natural actor-critic algorithms"); Nota & Thomas 2020 ("Is the policy gradient a
    gradient?").
    """
    return _visited_advantages(mdp, logits, discounted=False)


def _visited_advantages(mdp: TabularMDP, logits: Tensor, *, discounted: bool) -> Tensor:
    policy = softmax_policy(logits)
    visits = exact.occupancy(mdp, policy, discounted=discounted)
    return torch.from_numpy(np.ascontiguousarray(visits[:, None] * policy * exact.advantages(mdp, policy)))
