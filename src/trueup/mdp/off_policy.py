"""What one policy's episodes say of another policy: importance sampling in its four usual forms. NumPy.

The episodes' ``probabilities`` are their weights in every mean. Drawn by ``sample_trajectories``, the result is an
estimate; from ``enumerate_trajectories``, it is the estimator's exact mean and variance, which shows how they grow as
the policies part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from trueup.errors import DataError
from trueup.mdp.exact import state_values
from trueup.mdp.tabular import Policy, as_probabilities, check_choice
from trueup.mdp.trajectories import Trajectories
from trueup.objectives.divergence import prefix_ratio

Estimator = Literal["ordinary", "weighted", "per_decision", "doubly_robust"]


@dataclass(frozen=True, kw_only=True)
class OffPolicyValue:
    """An estimate of J = E_π[Σ_t γ^t r_t], π the target policy."""

    value: float
    variance: float
    """Of the estimate that a single episode makes (of the weighted estimator: for many episodes, by linearisation)."""
    error: float
    """√(variance / N) for the N episodes given: the standard error, if they were drawn."""
    effective_episodes: float
    """(Σ w)² / Σ w² of whole episodes' weights: as many of the target's own would have had equal weights. 0 if the
    target could have had none of them: whatever the error says then, nothing is known."""


def off_policy_value(
    trajectories: Trajectories,
    behaviour: Policy,
    target: Policy,
    gamma: float,
    *,
    estimator: Estimator = "per_decision",
    q: Float[np.ndarray, "s a"] | None = None,
) -> OffPolicyValue:
    """The target's return from episodes of the behaviour policy. With ρ_t = π(a_t|s_t)/b(a_t|s_t), w_t = ρ_0 ⋯ ρ_t:

        ordinary         mean of w_T · Σ_t γ^t r_t
        weighted         Σ w_T · Σ_t γ^t r_t / Σ w_T                       (biased, consistent; 0 if all w_T are)
        per_decision     mean of Σ_t γ^t · w_t · r_t
        doubly_robust    mean of V(s_0) + Σ_t γ^t · w_t · (r_t + γ·V(s_{t+1}) − Q(s_t, a_t)),  V(s) = Σ_a π(a|s)·Q(s, a)

    ``q`` [S, A]: an idea of the target's Q, for doubly_robust: the mean is right whatever it is, and the better it is
    the less the variance. Raises ``DataError`` if it is missing, if the behaviour never does what the target may, or if
    an episode was cut off, unless the estimator is doubly_robust: ``q`` then stands for what came after.
    Source: Precup, Sutton & Singh 2000; doubly robust: Jiang & Li 2016, eq. 10, and Thomas & Brunskill 2016, §5.
    """
    check_choice("estimator", estimator, Estimator)
    done, wanted = covered(behaviour, target)
    if (estimator == "doubly_robust") != (q is not None):
        raise DataError(f"{estimator} and q {'not ' if q is None else ''}given", way_out="doubly_robust needs q, alone")
    if estimator != "doubly_robust" and trajectories.truncated.any():
        raise DataError(f"{int(trajectories.truncated.sum())} episodes were cut off", way_out="raise the horizon")
    states, actions, mask = trajectories.states, trajectories.actions, torch.from_numpy(trajectories.mask)
    with np.errstate(divide="ignore"):
        logprobs, old_logprobs = (torch.from_numpy(np.log(each[states, actions])) for each in (wanted, done))
    weights = prefix_ratio(logprobs, old_logprobs, mask).numpy()
    discounts = gamma ** np.arange(states.shape[1]) * trajectories.mask
    # The product over a whole episode: masked steps, all at the end, hand on 1 in the place of it.
    lengths = trajectories.mask.sum(-1)
    whole = np.where(lengths > 0, weights[np.arange(len(weights)), np.maximum(lengths, 1) - 1], 1.0)
    shares = trajectories.probabilities
    if q is not None:
        v = state_values(q, wanted)
        after = np.where(trajectories.terminated, 0.0, v[trajectories.next_states])
        earned = trajectories.rewards + gamma * after - q[states, actions]
        first = np.where(lengths > 0, v[states[:, 0]], 0.0)
        single = first + (discounts * weights * earned).sum(-1)
    elif estimator == "per_decision":
        single = (discounts * weights * trajectories.rewards).sum(-1)
    else:
        single = whole * (discounts * trajectories.rewards).sum(-1)
    value = float(shares @ single)
    if estimator == "weighted":
        total = float(shares @ whole) or 1.0
        value /= total
        single = value + (single - whole * value) / total
    variance = float(shares @ (single - shares @ single) ** 2)
    squares = float(shares @ whole**2)
    return OffPolicyValue(
        value=value,
        variance=variance,
        error=float(np.sqrt(variance / len(shares))),
        effective_episodes=float(len(shares) * (shares @ whole) ** 2 / squares) if squares else 0.0,
    )


def covered(behaviour: Policy, target: Policy) -> tuple[Float[np.ndarray, "s a"], Float[np.ndarray, "s a"]]:
    """Both policies as probabilities. Raises ``DataError``, naming state and action, if the behaviour never does what
    the target may."""
    num_actions = max(each.shape[1] if each.ndim == 2 else int(each.max()) + 1 for each in (behaviour, target))
    done, wanted = (as_probabilities(policy, num_actions) for policy in (behaviour, target))
    if (where := np.argwhere((wanted > 0) & (done == 0))).size:
        raise DataError(
            "the target takes an action that the behaviour policy never takes",
            where="state {}, action {}".format(*where[0]),
            way_out="no weight makes up for what can't be seen: let the behaviour policy explore",
        )
    return done, wanted
