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

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trueup.control.actions import ActionSpace
from trueup.control.environments import Environments
from trueup.control.learner import Training
from trueup.control.networks import Head, Network
from trueup.control.normalization import RewardScale
from trueup.control.rollout import Rollout
from trueup.control.settings import ControlSettings
from trueup.control.surrogates import Batch, Surrogate, at
from trueup.objectives.advantages import gae
from trueup.objectives.policy_gradient import adapt_kl_penalty
from trueup.objectives.returns import discounts_from


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


def judge(
    rollout: Rollout, rewards: Float[Tensor, "s n t"], network: Network, actions: ActionSpace, settings: ControlSettings
) -> Batch:
    """Old log-probs, advantages and returns of a rollout's steps."""
    runs, number, steps = rewards.shape
    shape = runs, number, steps + 1
    parameters, values = at(network, actions, rollout.observations.flatten(1, 2))
    # The spread is the network's own tensor, which learning changes.
    parameters = tuple(_without_last(x, shape) if x.shape[1] > 1 else x.clone() for x in parameters)
    values = values.view(shape)
    # The final observations of all runs go through every run's network: there are few of them.
    everywhere = at(network, actions, rollout.final_observations.expand(runs, -1, -1))[1]
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
    return Batch(
        observations=_without_last(rollout.observations.flatten(1, 2), shape),
        actions=taken,
        old_parameters=parameters,
        old_logprobs=actions.logprobs(parameters, taken),
        old_values=old_values.flatten(1),
        advantages=advantages.flatten(1),
        returns=(advantages + old_values).flatten(1),
        mask=None if rollout.mask is None else rollout.mask.flatten(1),
    )


def _without_last(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """[S, N·(T+1), ·] → [S, N·T, ·]"""
    return x.view(*shape, -1)[:, :, :-1].flatten(1, 2)


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
        if settings.kl_stop is not None and bool((surrogate.kl(batch, network) > settings.kl_stop).any()):
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
                surrogate.kl_coef = torch.tensor(
                    [
                        [adapt_kl_penalty(beta, kl, settings.kl_target)]
                        for beta, kl in zip(surrogate.kl_coef.flatten().tolist(), measured["kl"].tolist(), strict=True)
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
