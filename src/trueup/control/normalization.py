"""Running statistics: observations to mean 0 and spread 1, rewards to returns of spread 1.

A rollout's observations are shown with the statistics that it began with, and folded into them once it has been learned
from: the policy that learns sees each observation as the policy that acted saw it. Its rewards, which no policy sees,
are folded in before they are scaled. In evaluation the statistics stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trueup.objectives.advantages import Statistics, merge_statistics, statistics_of
from trueup.objectives.returns import reverse_scan


class ObservationScale:
    """x ← clip((x − μ)/√(σ² + 1e-8), −c, c), with μ and σ² of everything that a run's environments showed.

    Source: OpenAI's baselines, as documented in Huang et al. 2022 ("The 37 implementation details of proximal policy
    optimization").
    """

    def __init__(self, num_runs: int, num_inputs: int, clip: float) -> None:
        zeros = torch.zeros(num_runs, 1, num_inputs, dtype=torch.float64)
        self.statistics, self.clip = Statistics(zeros, zeros, zeros + 1), clip
        self._set(self.statistics)

    def __call__(self, observations: Float[np.ndarray, "s n d"]) -> Float[np.ndarray, "s n d"]:
        scaled = observations - self._mean
        scaled *= self._scale
        # Not np.clip: for a few numbers its checks cost more than both of these.
        np.minimum(scaled, self.clip, out=scaled)
        return np.maximum(scaled, -self.clip, out=scaled)

    def fold(self, observations: Float[Tensor, "s m d"], mask: Bool[Tensor, "s m"] | None = None) -> None:
        """Add what was seen to the statistics, where ``mask`` is True: what no transition began with isn't counted."""
        scored = None if mask is None else mask.unsqueeze(-1).expand_as(observations)
        self._set(merge_statistics(self.statistics, statistics_of(observations.double(), scored, dim=1)))

    def state(self) -> dict[str, Tensor]:
        return dict(self.statistics._asdict())

    def restore(self, state: Mapping[str, Any]) -> None:
        self._set(Statistics(**state))

    def _set(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self._mean = statistics.mean.numpy().astype(np.float32)
        self._scale = (1 / np.sqrt(statistics.variance.numpy() + 1e-8)).astype(np.float32)


class RewardScale:
    """r ← clip(r / √(Var(G) + 1e-8), −c, c), where G is the discounted sum of an environment's rewards so far.

        G_t = γ·G_{t−1} + r_t,    begun anew with every episode

    The mean stays: taking it away would change which policy is best. Source: as ``ObservationScale``.
    """

    def __init__(self, num_runs: int, num_environments: int, gamma: float, clip: float) -> None:
        self.gamma, self.clip = gamma, clip
        zeros = torch.zeros(num_runs, 1, dtype=torch.float64)
        self.statistics = Statistics(zeros, zeros.clone(), zeros + 1)
        self.running = torch.zeros(num_runs, num_environments, dtype=torch.float64)

    def __call__(
        self,
        rewards: Float[Tensor, "s n t"],
        ended: Bool[Tensor, "s n t"],
        mask: Bool[Tensor, "s n t"] | None = None,
        *,
        fold: bool = True,
    ) -> Float[Tensor, "s n t"]:
        """The rewards of a rollout, scaled; with ``fold`` they are part of the statistics first.

        ``mask``: False where a step was no transition. Its reward is 0, and its G isn't counted.
        """
        if fold:
            sums = self._sums(rewards.double(), ended)
            self.running = torch.where(ended[..., -1], 0.0, sums[..., -1])
            scored = None if mask is None else mask.flatten(1)
            self.statistics = merge_statistics(self.statistics, statistics_of(sums.flatten(1), scored, dim=1))
        scale = (self.statistics.variance + 1e-8).sqrt().unsqueeze(-1)
        return (rewards / scale).clamp(-self.clip, self.clip).to(rewards.dtype)

    def _sums(self, rewards: Tensor, ended: Tensor) -> Tensor:
        """G of every step: the recursion of returns, with time the other way round."""
        goes_on = self.gamma * (~ended).double()
        rewards = rewards.clone()
        rewards[..., 0] += self.gamma * self.running
        carried = torch.nn.functional.pad(goes_on[..., :-1], (1, 0))
        return reverse_scan(rewards.flip(-1), carried.flip(-1)).flip(-1)

    def state(self) -> dict[str, Tensor]:
        return {**self.statistics._asdict(), "running": self.running}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.running = state["running"]
        self.statistics = Statistics(state["count"], state["mean"], state["variance"])
