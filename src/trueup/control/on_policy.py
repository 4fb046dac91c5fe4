"""REINFORCE, A2C and PPO: gather a rollout, judge its actions, follow the gradient of a surrogate.

    for each iteration:
        run the policy π_old for T steps in N environments
        A_t, G_t ← generalised advantages, and the returns that values are fitted to
        for each epoch, for each minibatch:
            minimise  surrogate(π/π_old, A) + c_v·value_loss(V, G) − c_e·entropy(π)

(Schulman et al. 2017, arXiv 1707.06347, algorithm 1.) The three differ in their settings only: REINFORCE and A2C take
the log-probs as surrogate and one step on all of a rollout, which for REINFORCE is whole episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trueup.control.actions import ActionSpace, Parameters
from trueup.control.environments import Environments
from trueup.control.learner import Training
from trueup.control.networks import Head, Network, Passed
from trueup.control.normalization import RewardScale
from trueup.control.rollout import Rollout
from trueup.control.settings import ControlSettings
from trueup.objectives import derivatives
from trueup.objectives import policy_gradient as objectives
from trueup.objectives.advantages import gae, statistics_of, whiten
from trueup.objectives.divergence import k3_of_old
from trueup.objectives.returns import discounts_from
from trueup.objectives.value import clipped_value_loss, explained_variance, value_loss


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
        """As many equal parts, one after the other; what is left over goes to the last ones."""
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


def policy_network(settings: ControlSettings, environments: Environments) -> Network:
    """A trunk and a head for the policy, another of each for values; the policy's begins near uniform."""
    actions = environments.actions
    heads = [Head(0, actions.num_outputs, 0.01)]
    if settings.baseline:
        heads.append(Head(1, 1, 1.0))
    return Network(
        settings.seeds,
        environments.num_inputs,
        heads,
        hidden=settings.hidden,
        activation=settings.activation,
        spread=actions.size if actions.has_spread else 0,
        log_std=settings.log_std,
    )


def predict(network: Network, passed: Passed) -> tuple[Parameters, Float[Tensor, "s m"]]:
    """Parameters of the policy's distributions, and values (0 without a value head)."""
    outputs, *values = map(torch.from_numpy, passed.outputs)
    spread = network.parameters.get("log_std")
    parameters = (outputs,) if spread is None else (outputs, spread)
    return parameters, values[0].squeeze(-1) if values else outputs.new_zeros(outputs.shape[:2])


def at(network: Network, observations: Float[Tensor, "s m d"]) -> tuple[Parameters, Float[Tensor, "s m"]]:
    return predict(network, network.forward(observations.numpy()))


def judge(
    rollout: Rollout, rewards: Float[Tensor, "s n t"], network: Network, actions: ActionSpace, settings: ControlSettings
) -> Batch:
    """Old log-probs, advantages and returns of a rollout's steps."""
    runs, number, steps = rewards.shape
    shape = runs, number, steps + 1
    parameters, values = at(network, rollout.observations.flatten(1, 2))
    # The spread is the network's own tensor, which learning changes.
    parameters = tuple(_without_last(x, shape) if x.shape[1] > 1 else x.clone() for x in parameters)
    values = values.view(shape)
    # The final observations of all runs go through every run's network: there are few of them.
    everywhere = at(network, rollout.final_observations.expand(runs, -1, -1))[1]
    final_values = everywhere[rollout.final_places[0], torch.arange(everywhere.shape[1])]
    old_values = values[..., :-1]
    advantages = gae(
        rewards,
        discounts_from(rollout.terminated, settings.gamma, dtype=rewards.dtype),
        old_values,
        rollout.values_after(values, final_values),
        gae_lambda=settings.gae_lambda,
        truncated=rollout.ended,
        mask=rollout.mask,
    )
    taken = rollout.actions.flatten(1, 2)
    batch = Batch(
        observations=_without_last(rollout.observations.flatten(1, 2), shape),
        actions=taken,
        old_parameters=parameters,
        old_logprobs=actions.logprobs(parameters, taken),
        old_values=old_values.flatten(1),
        advantages=advantages.flatten(1),
        returns=(advantages + old_values).flatten(1),
        mask=None if rollout.mask is None else rollout.mask.flatten(1),
    )
    return batch


def _without_last(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """[S, N·(T+1), ·] → [S, N·T, ·]"""
    return x.view(*shape, -1)[:, :, :-1].flatten(1, 2)


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
    def clip(self) -> float:
        return self.settings.clip * (self.left if self.settings.clip_schedule == "linear" else 1.0)

    def policy_loss(self, logprobs: Tensor, apart: Tensor, batch: Batch) -> Float[Tensor, "s b"]:
        """Of every step; ``apart`` is KL[π_old, π]."""
        if self.settings.surrogate == "reinforce":
            return objectives.reinforce(logprobs, batch.advantages)
        moved = objectives.ratio(logprobs, batch.old_logprobs)
        if self.settings.surrogate == "clip":
            return objectives.clipped_surrogate(moved, batch.advantages, clip_low=self.clip, clip_high=self.clip)
        kl_coef = self.kl_coef if self.penalizes else 0.0
        return objectives.kl_penalized_surrogate(moved, batch.advantages, apart, kl_coef=kl_coef)

    def policy_derivative(self, logprobs: Tensor, batch: Batch) -> Float[Tensor, "s b"]:
        """Of ``policy_loss`` with respect to the log-probs; with respect to the KL it is ``kl_coef``."""
        if self.settings.surrogate == "reinforce":
            return derivatives.reinforce(batch.advantages)
        moved = objectives.ratio(logprobs, batch.old_logprobs)
        if self.settings.surrogate == "clip":
            return derivatives.clipped_surrogate(moved, batch.advantages, clip_low=self.clip, clip_high=self.clip)
        return derivatives.surrogate(moved, batch.advantages)

    def value_loss(self, batch: Batch, values: Float[Tensor, "s b"]) -> Float[Tensor, "s b"]:
        if self.settings.value_clip is None:
            return value_loss(values, batch.returns)
        return clipped_value_loss(values, batch.old_values, batch.returns, clip=self.settings.value_clip)

    def value_derivative(self, batch: Batch, values: Float[Tensor, "s b"]) -> Float[Tensor, "s b"]:
        if self.settings.value_clip is None:
            return derivatives.value_loss(values, batch.returns)
        return derivatives.clipped_value_loss(values, batch.old_values, batch.returns, clip=self.settings.value_clip)

    def differentiate(self, batch: Batch, network: Network) -> None:
        """Leave in the network the gradient of each run's mean loss over its minibatch:

            policy_loss + c_v·value_loss − c_e·entropy

        Runs have no parameter in common, so that the gradient of the sum over runs is each one's own.
        """
        settings = self.settings
        passed = network.forward(batch.observations.numpy())
        parameters, values = predict(network, passed)
        logprobs = self.actions.logprobs(parameters, batch.actions)
        share = (
            1 / logprobs.shape[1] if batch.mask is None else batch.mask / batch.mask.sum(-1, keepdim=True).clamp(min=1)
        )
        everywhere = torch.ones_like(logprobs) * share
        errors = self.actions.derivatives(
            parameters,
            batch.actions,
            by_logprobs=self.policy_derivative(logprobs, batch) * share,
            by_entropy=-settings.entropy_coef * everywhere if settings.entropy_coef else None,
            by_kl=self.kl_coef * everywhere if self.penalizes else None,
            old=batch.old_parameters,
        )
        by_outputs = [errors[0].numpy()]
        if settings.baseline:
            by_values = self.value_derivative(batch, values) * share * settings.value_coef
            by_outputs.append(by_values.unsqueeze(-1).numpy())
        network.backward(passed, by_outputs, errors[1].numpy() if len(errors) > 1 else None)

    def measure(self, batch: Batch, network: Network) -> dict[str, Float[Tensor, " s"]]:
        """What an update has done to each run: distances between the policies before and after, losses, entropy."""
        parameters, values = at(network, batch.observations)
        logprobs = self.actions.logprobs(parameters, batch.actions)
        apart = self.actions.kl(batch.old_parameters, parameters)
        steps: dict[str, Tensor] = {
            "policy_loss": self.policy_loss(logprobs, apart, batch),
            "entropy": self.actions.entropy(parameters),
            "kl": apart,
            "approx_kl": k3_of_old(logprobs, batch.old_logprobs),
        }
        if self.settings.surrogate == "clip":
            moved = objectives.ratio(logprobs, batch.old_logprobs)
            out = objectives.clipped(moved, batch.advantages, clip_low=self.clip, clip_high=self.clip)
            steps["clip_fraction"] = out.to(moved.dtype)
        if self.settings.baseline:
            steps["value_loss"] = self.value_loss(batch, values)
        means = {name: _mean(x, batch.mask) for name, x in steps.items()}
        if self.settings.baseline:
            means["explained_variance"] = torch.stack(
                [
                    explained_variance(*(x if mask is None else x[mask] for x in (old, returns)))
                    for old, returns, mask in zip(
                        batch.old_values,
                        batch.returns,
                        batch.mask if batch.mask is not None else [None] * len(values),
                        strict=True,
                    )
                ]
            )
        return means


def _mean(x: Float[Tensor, "s m"], mask: Bool[Tensor, "s m"] | None) -> Float[Tensor, " s"]:
    return x.mean(-1) if mask is None else (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def learn(training: Training, surrogate: Surrogate, batch: Batch) -> None:
    """Epochs of minibatches over one rollout, each run's in an order of its own."""
    settings, network = training.settings, training.agent.network
    if settings.normalize_advantages == "rollout":
        batch = batch.normalized(1)
    num_steps = batch.returns.shape[1]
    num_batches = max(1, num_steps // settings.minibatch_size) if settings.minibatch_size else 1
    for _ in range(settings.num_epochs):
        order = torch.from_numpy(training.random.stack(lambda rng: rng.permutation(num_steps)))
        shuffled = batch.at(order) if num_batches > 1 else batch
        if settings.normalize_advantages == "minibatch":
            shuffled = shuffled.normalized(num_batches)
        for minibatch in shuffled.split(num_batches):
            surrogate.differentiate(minibatch, network)
            training.learner.step()
        if settings.kl_stop is not None and bool((surrogate.measure(batch, network)["kl"] > settings.kl_stop).any()):
            break


def train_on_policy(training: Training) -> None:
    """The loop of the module's docstring."""
    settings, agent, network = training.settings, training.agent, training.agent.network
    runs, number = len(settings.seeds), settings.num_envs
    rewards_scale = RewardScale(runs, number, settings.gamma, settings.reward_clip)
    surrogate = Surrogate(settings, agent.actions, torch.full((runs, 1), settings.kl_coef))

    def own_state() -> dict[str, Any]:
        return {"rewards": rewards_scale.state(), "kl_coef": surrogate.kl_coef}

    def take_over(state: Mapping[str, Any]) -> None:
        rewards_scale.restore(state["rewards"])
        surrogate.kl_coef = state["kl_coef"]

    def noise(num_steps: int) -> np.ndarray:
        return training.random.stack(lambda rng: agent.actions.noise(rng, (num_steps, number)), axis=1)

    training.own_state = own_state
    step = training.begin(take_over)
    updates = 0
    with training.session.running(step, settings.total_steps, unit="steps") as progress:
        if step == 0:
            training.evaluate(0)
        while step < settings.total_steps:
            left = 1 - step / settings.total_steps
            training.learner.at(left)
            surrogate.left = left
            rollout = training.collector.gather(
                settings.rollout_steps, agent.act, agent.seen, noise, whole_episodes=settings.algorithm == "reinforce"
            )
            rewards = rollout.rewards
            if settings.normalize_rewards:
                rewards = rewards_scale(rewards, rollout.ended, rollout.mask)
            batch = judge(rollout, rewards, network, agent.actions, settings)
            learn(training, surrogate, batch)
            measured = surrogate.measure(batch, network)
            if settings.surrogate == "adaptive_kl":
                moved = measured["kl"].tolist()
                surrogate.kl_coef = torch.tensor(
                    [
                        [objectives.adapt_kl_penalty(beta, kl, settings.kl_target)]
                        for beta, kl in zip(surrogate.kl_coef.flatten().tolist(), moved, strict=True)
                    ]
                )
                measured["kl_coef"] = surrogate.kl_coef.flatten()
            if agent.scale is not None:
                agent.scale.fold(rollout.raw_observations[:, :, :-1].flatten(1, 2), batch.mask)
            before, step = step, min(step + rollout.num_steps, settings.total_steps)
            updates += 1
            shown = {}
            if updates % settings.log_every == 0 or step == settings.total_steps:
                shown = training.report(measured, step)
            progress.step(num_steps=step - before, num_tokens=runs * (step - before), metrics=shown)
            training.after(before, step)
