"""Value functions: what they are regressed on, and by which loss.

Targets are constants: they come detached, so that a loss on them is a semi-gradient step. Losses are per step,
unreduced, with the factor ½, so that the gradient of the squared loss is ``values − returns``.
``discounts`` as in ``returns``: γ, and 0 where the episode terminated (not where it was truncated).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trueup.objectives.shapes import require_not_negative, require_positive, require_same_shape


def explained_variance(values: Float[Tensor, "*batch"], returns: Float[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """How much of the returns' variance the values explain.

        1 − Var(G − V) / Var(G)

    1: all of it; 0: no more than a constant does; below 0: less. An offset of all values is not seen. 0 for returns
    that are all equal. Shapes: [...], alike → []. Raises ``ValueError`` if the shapes differ.
    Source: the coefficient of determination, of the values without their mean error.
    """
    left = _error(values, returns).var(correction=0)
    variance = returns.var(correction=0)
    return torch.where(variance > 0, 1 - left / variance, 0.0)


def value_loss(values: Float[Tensor, "*batch"], returns: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Half the squared error.

        L = ½ (V(s) − G)²

    Its minimiser is the mean return of each state. No gradient flows into ``returns``.
    Shapes: [...], alike. Units: returns². Raises ``ValueError`` if the shapes differ.
    Source: Sutton & Barto 2018, §9.2 (the value error) and §9.3 (its gradient step).
    """
    return 0.5 * _error(values, returns).square()


def clipped_value_loss(
    values: Float[Tensor, "*batch"],
    old_values: Float[Tensor, "*batch"],
    returns: Float[Tensor, "*batch"],
    *,
    clip: float,
) -> Float[Tensor, "*batch"]:
    """Half the squared error, without gain from moving the value further than ``clip`` from its old self.

        V_c = V_old + clip(V − V_old, −ε, ε),    L = ½ max((V − G)², (V_c − G)²)

    An implementation detail of PPO, not of its paper. ``clip`` ε is in units of the returns: it depends on their scale.
    Shapes: [...], alike. Raises ``ValueError`` if they differ or ε is negative.
    Source: OpenAI's baselines, as documented in Huang et al. 2022 ("The 37 implementation details of proximal policy
    optimization").
    """
    require_not_negative("clip", clip)
    old = old_values.detach()
    near = old + _error(values, old).clamp(-clip, clip)
    return 0.5 * torch.maximum(_error(values, returns).square(), _error(near, returns).square())


def huber_value_loss(
    values: Float[Tensor, "*batch"], returns: Float[Tensor, "*batch"], *, delta: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Squared near the target, linear far from it: the gradient never exceeds δ.

        L = ½ e² if |e| ≤ δ, else δ·(|e| − ½ δ),    e = V(s) − G

    Its minimiser lies between mean and median of the returns: biased where they are skewed.
    ``delta`` in units of the returns. Shapes: [...], alike. Raises ``ValueError`` if they differ or δ isn't positive.
    Source: Huber 1964; in deep RL Mnih et al. 2015 (DQN's error clipping).
    """
    require_positive("delta", delta)
    size = _error(values, returns).abs()
    return torch.where(size <= delta, 0.5 * size.square(), delta * (size - 0.5 * delta))


def td_target(
    rewards: Float[Tensor, "*batch"], discounts: Float[Tensor, "*batch"], next_values: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """One-step target of a state's value.

        y = r + d · V(s')

    Its mean, under the policy and with the policy's true values, is V(s) (Bellman's equation).
    Shapes: [...], alike. Units: rewards. Raises ``ValueError`` if they differ. Source: Sutton & Barto 2018, eq. 6.2.
    """
    require_same_shape(rewards, discounts=discounts, next_values=next_values)
    return (rewards + discounts * next_values).detach()


def q_learning_target(
    rewards: Float[Tensor, "*batch"],
    discounts: Float[Tensor, "*batch"],
    next_q: Float[Tensor, "*batch a"],
    legal: Bool[Tensor, "*batch a"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Target of an action's value under the greedy policy.

        y = r + d · max_a' Q(s', a')

    The fixed point is Q*. With estimates, the maximum picks out their errors and is biased upwards (``double_…``).
    ``legal``: which actions the next state offers; at least one, unless d = 0 there.
    Shapes: [...] and [..., A] → [...]. Units: rewards. Raises ``ValueError`` if the shapes differ.
    Source: Watkins & Dayan 1992; Sutton & Barto 2018, eq. 6.8.
    """
    return double_q_learning_target(rewards, discounts, next_q, next_q, legal)


def double_q_learning_target(
    rewards: Float[Tensor, "*batch"],
    discounts: Float[Tensor, "*batch"],
    next_q_selecting: Float[Tensor, "*batch a"],
    next_q_evaluating: Float[Tensor, "*batch a"],
    legal: Bool[Tensor, "*batch a"] | None = None,
) -> Float[Tensor, "*batch"]:
    """One estimate selects the action, the other one says what it is worth.

        y = r + d · Q_eval(s', argmax_a' Q_select(s', a'))

    In Double DQN the online network selects and the target network evaluates.
    Shapes: [...] and [..., A] → [...]. Units: rewards. Raises ``ValueError`` if the shapes differ.
    Source: van Hasselt 2010; van Hasselt, Guez & Silver 2016 (arXiv 1509.06461).
    """
    require_same_shape(next_q_selecting, next_q_evaluating=next_q_evaluating, legal=legal)
    choices = next_q_selecting if legal is None else torch.where(legal, next_q_selecting, -torch.inf)
    return sarsa_target(rewards, discounts, next_q_evaluating, choices.argmax(-1))


def sarsa_target(
    rewards: Float[Tensor, "*batch"],
    discounts: Float[Tensor, "*batch"],
    next_q: Float[Tensor, "*batch a"],
    next_actions: Int[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Target of an action's value under the policy that took the next action.

        y = r + d · Q(s', a')

    ``next_actions`` where the episode terminated: any valid index, it has no weight.
    Shapes: [...] and [..., A] → [...]. Units: rewards. Raises ``ValueError`` if the shapes differ.
    Source: Rummery & Niranjan 1994; Sutton & Barto 2018, eq. 6.7.
    """
    require_same_shape(next_q[..., 0], next_actions=next_actions)
    return td_target(rewards, discounts, next_q.gather(-1, next_actions.unsqueeze(-1)).squeeze(-1))


def expected_sarsa_target(
    rewards: Float[Tensor, "*batch"],
    discounts: Float[Tensor, "*batch"],
    next_q: Float[Tensor, "*batch a"],
    next_probs: Float[Tensor, "*batch a"],
) -> Float[Tensor, "*batch"]:
    """As SARSA, with the mean over the next action instead of a sample of it.

        y = r + d · Σ_a' π(a'|s') · Q(s', a')

    The same mean as SARSA's target, with less variance; with a greedy π it is Q-learning's.
    Shapes: [...] and [..., A] → [...]. Units: rewards. Raises ``ValueError`` if the shapes differ.
    Source: van Seijen et al. 2009; Sutton & Barto 2018, eq. 6.9.
    """
    require_same_shape(next_q, next_probs=next_probs)
    return td_target(rewards, discounts, (next_probs * next_q).sum(-1))


def _error(values: Tensor, targets: Tensor) -> Tensor:
    require_same_shape(values, targets=targets)
    return values - targets.detach()
