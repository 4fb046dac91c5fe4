"""What a policy learns from, and what is minimised on it: a surrogate, the values' loss, entropy; and its gradient.

The gradient is written out (``objectives.derivatives``): for networks this small autograd is most of an update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trueup.control.actions import ActionSpace, Parameters
from trueup.control.networks import Network, Passed
from trueup.control.settings import ControlSettings
from trueup.objectives import derivatives, policy_gradient, value
from trueup.objectives.advantages import statistics_of, whiten
from trueup.objectives.divergence import k3_of_old


@dataclass(frozen=True, kw_only=True)
class Batch:
    """M = N·T steps of each of S runs, as the learner takes them."""

    observations: Float[Tensor, "s m d"]
    actions: Float[Tensor, "s m a"]
    old_parameters: Parameters
    """Of the distributions that the actions were drawn from: [S, M, ·] or [S, 1, ·]."""
    old_logprobs: Float[Tensor, "s m"]
    old_values: Float[Tensor, "s m"]
    advantages: Float[Tensor, "s m"]
    returns: Float[Tensor, "s m"]
    mask: Bool[Tensor, "s m"] | None

    def at(self, places: Int[Tensor, "s b"]) -> Batch:
        """The steps at ``places``, in that order."""
        return self._each(
            lambda x: x.gather(1, places if x.dim() == 2 else places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        )

    def split(self, num_parts: int) -> list[Batch]:
        """As many parts, one after the other, whose lengths differ by 1 at most."""
        bounds = np.linspace(0, self.returns.shape[1], num_parts + 1).astype(int)
        return [
            self._each(lambda x, start=start, length=end - start: x.narrow(1, start, length))
            for start, end in zip(bounds.tolist(), bounds[1:].tolist(), strict=False)
        ]

    def normalized(self, num_parts: int) -> Batch:
        """Advantages with mean 0 and spread 1, in each of the parts that ``split`` gives."""
        parts = [
            whiten(part.advantages, part.mask, statistics_of(part.advantages, part.mask, dim=1))
            for part in self.split(num_parts)
        ]
        return replace(self, advantages=torch.cat(parts, 1))

    def _each(self, pick: Callable[[Tensor], Tensor]) -> Batch:
        """Every field but what is the same for all steps."""
        return Batch(
            observations=pick(self.observations),
            actions=pick(self.actions),
            old_parameters=tuple(x if x.shape[1] == 1 else pick(x) for x in self.old_parameters),
            old_logprobs=pick(self.old_logprobs),
            old_values=pick(self.old_values),
            advantages=pick(self.advantages),
            returns=pick(self.returns),
            mask=None if self.mask is None else pick(self.mask),
        )


def at(
    network: Network, actions: ActionSpace, observations: Float[Tensor, "s m d"]
) -> tuple[Parameters, Float[Tensor, "s m"]]:
    """Parameters of the policy's distributions, and values (0 without a value head)."""
    return predict(network, actions, network.forward(observations.numpy()))


def predict(network: Network, actions: ActionSpace, passed: Passed) -> tuple[Parameters, Float[Tensor, "s m"]]:
    outputs, *values = map(torch.from_numpy, passed.outputs)
    parameters = actions.parameters(outputs, network.parameters.get("log_std"))
    return parameters, values[0].squeeze(-1) if values else outputs.new_zeros(outputs.shape[:2])


@dataclass
class Surrogate:
    """The objective of a minibatch and what moves with time: how far the ratio may go, what the KL penalty weighs."""

    settings: ControlSettings
    actions: ActionSpace
    kl_coef: Float[Tensor, "s 1"]
    left: float = 1.0
    """Part of the run that is still to come."""

    @property
    def penalizes(self) -> bool:
        """Whether the KL divergence from the old policy is part of the loss."""
        return self.settings.surrogate in ("kl", "adaptive_kl")

    @property
    def clips(self) -> dict[str, float]:
        """How far the ratio may go, either way."""
        clip = self.settings.clip * (self.left if self.settings.clip_schedule == "linear" else 1.0)
        return {"clip_low": clip, "clip_high": clip}

    def policy_loss(
        self, logprobs: Float[Tensor, "s b"], batch: Batch, *, derivative: bool = False
    ) -> Float[Tensor, "s b"]:
        """Of every step, without a KL penalty; or its derivative with respect to the log-prob."""
        of = derivatives if derivative else policy_gradient
        if self.settings.surrogate == "reinforce":
            return of.reinforce(logprobs, batch.advantages)
        ratio = policy_gradient.ratio(logprobs, batch.old_logprobs)
        if self.settings.surrogate == "clip":
            return of.clipped_surrogate(ratio, batch.advantages, **self.clips)
        return of.surrogate(ratio, batch.advantages)

    def value_loss(
        self, values: Float[Tensor, "s b"], batch: Batch, *, derivative: bool = False
    ) -> Float[Tensor, "s b"]:
        """Of every step; or its derivative with respect to the value."""
        of = derivatives if derivative else value
        if self.settings.value_clip is None:
            return of.value_loss(values, batch.returns)
        return of.clipped_value_loss(values, batch.old_values, batch.returns, clip=self.settings.value_clip)

    def differentiate(self, batch: Batch, network: Network) -> None:
        """Leave in the network the gradient of each run's mean loss over its minibatch:

            policy_loss + β·KL[π_old, π] + c_v·value_loss − c_e·entropy

        Runs have no parameter in common, so that the gradient of the sum over runs is each one's own.
        """
        settings = self.settings
        passed = network.forward(batch.observations.numpy())
        parameters, values = predict(network, self.actions, passed)
        logprobs = self.actions.logprobs(parameters, batch.actions)
        share = (
            1 / logprobs.shape[1] if batch.mask is None else batch.mask / batch.mask.sum(-1, keepdim=True).clamp(min=1)
        )
        everywhere = torch.ones_like(logprobs) * share
        errors = self.actions.derivatives(
            parameters,
            batch.actions,
            by_logprobs=self.policy_loss(logprobs, batch, derivative=True) * share,
            by_entropy=-settings.entropy_coef * everywhere if settings.entropy_coef else None,
            by_kl=self.kl_coef * everywhere if self.penalizes else None,
            old=batch.old_parameters,
        )
        by_outputs = [errors[0].numpy()]
        if settings.baseline:
            by_values = self.value_loss(values, batch, derivative=True) * share * settings.value_coef
            by_outputs.append(by_values.unsqueeze(-1).numpy())
        network.backward(passed, by_outputs, errors[1].numpy() if len(errors) > 1 else None)

    def kl(self, batch: Batch, network: Network) -> Float[Tensor, " s"]:
        """Mean KL[π_old, π] of each run: how far the update has gone."""
        parameters, _ = at(network, self.actions, batch.observations)
        return _mean(self.actions.kl(batch.old_parameters, parameters), batch.mask)

    def measure(self, batch: Batch, network: Network) -> dict[str, Float[Tensor, " s"]]:
        """What an update has done to each run: distances between the policies before and after, losses, entropy."""
        parameters, values = at(network, self.actions, batch.observations)
        logprobs = self.actions.logprobs(parameters, batch.actions)
        kl = self.actions.kl(batch.old_parameters, parameters)
        ratio = policy_gradient.ratio(logprobs, batch.old_logprobs)
        steps: dict[str, Tensor] = {
            "policy_loss": self.policy_loss(logprobs, batch),
            "entropy": self.actions.entropy(parameters),
            "kl": kl,
            "approx_kl": k3_of_old(logprobs, batch.old_logprobs),
        }
        if self.penalizes:
            steps["policy_loss"] = policy_gradient.kl_penalized_surrogate(
                ratio, batch.advantages, kl, kl_coef=self.kl_coef
            )
        if self.settings.surrogate == "clip":
            steps["clip_fraction"] = policy_gradient.clipped(ratio, batch.advantages, **self.clips).to(ratio.dtype)
        if self.settings.baseline:
            steps["value_loss"] = self.value_loss(values, batch)
        means = {name: _mean(x, batch.mask) for name, x in steps.items()}
        if self.settings.baseline:
            masks = batch.mask if batch.mask is not None else [None] * len(values)
            means["explained_variance"] = torch.stack(
                [
                    value.explained_variance(*(x if mask is None else x[mask] for x in (old, returns)))
                    for old, returns, mask in zip(batch.old_values, batch.returns, masks, strict=True)
                ]
            )
        return means


def _mean(x: Float[Tensor, "s m"], mask: Bool[Tensor, "s m"] | None) -> Float[Tensor, " s"]:
    return x.mean(-1) if mask is None else (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)
