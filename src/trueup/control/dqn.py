"""DQN: action values from replayed experience, with targets from an older copy of the network.

    for each round of steps:
        act: a random action with probability ε, else argmax_a Q(s, a); keep what happened
        draw transitions (s, a, r, d, s') and minimise  w·½(Q(s, a) − y)²,    y = r + d·Q⁻(s', a*)
        every so often Q⁻ ← Q

a* is the action that Q⁻ finds best, or with ``double`` the one that Q finds best (van Hasselt et al. 2016, arXiv
1509.06461). Duelling: Q = V + A − mean_a A (Wang et al. 2016, arXiv 1511.06581). n steps and priorities: ``replay``.
Source: Mnih et al. 2015, "Human-level control through deep reinforcement learning", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from trueup.control.actions import Choices
from trueup.control.environments import Environments
from trueup.control.learner import Training
from trueup.control.networks import Head, Network
from trueup.control.replay import Priorities, Replay, Spans, following_observation
from trueup.control.settings import ControlSettings
from trueup.errors import SettingsError
from trueup.objectives import derivatives
from trueup.objectives.value import double_q_learning_target, value_loss


def value_network(settings: ControlSettings, environments: Environments) -> Network:
    """One trunk; a head for the values (duelling: for the advantages, and one for the state's value).

    Raises ``SettingsError`` for actions that can't be counted.
    """
    actions = environments.actions
    if not isinstance(actions, Choices) or not actions.single:
        raise SettingsError(
            "dqn needs one choice among a few actions (Discrete)", where="--algorithm", way_out="--algorithm ppo"
        )
    heads = [Head(0, actions.num_outputs, 0.1)]
    if settings.duelling:
        heads.append(Head(0, 1, 1.0))
    return Network(
        settings.seeds, environments.num_inputs, heads, hidden=settings.hidden, activation=settings.activation
    )


def action_values(outputs: Sequence[Float[np.ndarray, "s b o"]]) -> Float[np.ndarray, "s b a"]:
    """Q from the heads' outputs: as it is, or of advantages and a value."""
    if len(outputs) == 1:
        return outputs[0]
    advantages, values = outputs
    return values + advantages - advantages.mean(-1, keepdims=True)


def by_heads(by_values: Float[np.ndarray, "s b a"], num_heads: int) -> list[Float[np.ndarray, "s b o"]]:
    """From derivatives by Q to those by the heads' outputs."""
    if num_heads == 1:
        return [by_values]
    return [by_values - by_values.mean(-1, keepdims=True), by_values.sum(-1, keepdims=True)]


def train_dqn(training: Training) -> None:
    """The loop of the module's docstring."""
    settings, agent, network = training.settings, training.agent, training.agent.network
    runs, number = len(settings.seeds), settings.num_envs
    collector, random = training.collector, training.random
    num_actions = agent.actions.num_outputs
    older = network.copy()
    replay = Replay(runs, settings.buffer_size, network.num_inputs)
    priorities = Priorities(runs, settings.buffer_size, settings.priority_alpha) if settings.prioritized else None
    spans = Spans(runs * number, settings.n_step, settings.gamma)

    def own_state() -> dict[str, Any]:
        return {
            "older": older.flat.clone(),
            "replay": replay.state(),
            "priorities": None if priorities is None else priorities.state(),
            "spans": spans.state(),
        }

    def take_over(state: Mapping[str, Any]) -> None:
        older.flat.copy_(state["older"])
        replay.restore(state["replay"])
        if priorities is not None:
            priorities.restore(state["priorities"])
        if state["resumed"]:
            spans.restore(state["spans"])

    def act(share: float, uniforms: Float[np.ndarray, "s n 2"]) -> np.ndarray:
        """ε-greedy: with probability ε one of all actions, evenly."""
        greedy = network.act(collector.observations).argmax(-1)
        return np.where(uniforms[..., 0] < share, (uniforms[..., 1] * num_actions).astype(np.int64), greedy)

    def keep(actions: np.ndarray) -> None:
        """Take one step everywhere and remember it."""
        seen = collector.observations.reshape(runs * number, -1)
        chosen = actions.reshape(-1)
        step = collector.step(chosen[:, None])
        for row in range(runs * number):
            if step.is_reset is not None and step.is_reset[row]:
                continue
            complete = spans.add(
                row,
                seen[row],
                int(chosen[row]),
                float(step.rewards[row]),
                following_observation(step, row),
                terminated=bool(step.terminated[row]),
                truncated=bool(step.truncated[row]),
            )
            for transition in complete:
                place = replay.add(row // number, transition)
                if priorities is not None:
                    priorities.add(row // number, place)

    def update(left: float) -> dict[str, Float[torch.Tensor, " s"]]:
        """One optimiser step."""
        sizes = replay.size
        uniforms = random.stack(lambda rng: rng.random(settings.minibatch_size))
        if priorities is None:
            places = (uniforms * sizes[:, None]).astype(np.int64)
            weights = np.ones(uniforms.shape, np.float32)
        else:
            beta = 1 - left * (1 - settings.priority_beta)
            places, weights = priorities.draw(uniforms, sizes, beta)
        batch = replay.at(places)
        behind = action_values(older.forward(batch.next_observations).outputs)
        selecting = action_values(network.forward(batch.next_observations).outputs) if settings.double else behind
        targets = double_q_learning_target(*map(torch.from_numpy, (batch.rewards, batch.discounts, selecting, behind)))
        passed = network.forward(batch.observations)
        values = action_values(passed.outputs)
        taken = torch.from_numpy(np.take_along_axis(values, batch.actions[..., None], -1)[..., 0])
        by_taken = (
            derivatives.value_loss(taken, targets)
            if settings.huber_delta is None
            else derivatives.huber_value_loss(taken, targets, delta=settings.huber_delta)
        ).numpy()
        by_taken *= weights / settings.minibatch_size
        by_values = np.zeros_like(values)
        np.put_along_axis(by_values, batch.actions[..., None], by_taken[..., None].astype(values.dtype), -1)
        network.backward(passed, by_heads(by_values, len(network.heads)))
        training.learner.step()
        if priorities is not None:
            priorities.change(places, (targets - taken).numpy())
        return {
            "value_loss": value_loss(taken, targets).mean(-1),
            "q_value": taken.mean(-1),
            "td_error": (targets - taken).abs().mean(-1),
        }

    training.own_state = own_state
    step = training.begin(take_over)
    measured: dict[str, Float[torch.Tensor, " s"]] = {}
    with training.session.running(step, settings.total_steps, unit="steps") as progress:
        if step == 0:
            training.evaluate(0)
        while step < settings.total_steps:
            left = 1 - step / settings.total_steps
            training.learner.at(left)
            share = exploration(settings, step)
            uniforms = random.stack(lambda rng: rng.random((settings.train_every, number, 2)), axis=1)
            for of_step in uniforms:
                keep(act(share, of_step))
            before, step = step, min(step + settings.train_every * number, settings.total_steps)
            # Of the first n − 1 steps no transition may be complete yet.
            if step > settings.learning_starts and replay.size.all():
                for _ in range(settings.updates_per_round):
                    measured = update(left)
            if step // settings.target_every > before // settings.target_every:
                older.flat.copy_(network.flat)
            every = 1000 * settings.log_every
            shown = {}
            if measured and (step // every > before // every or step == settings.total_steps):
                shown = training.report(measured | {"exploration": share}, step)
            progress.step(num_steps=step - before, num_tokens=runs * (step - before), metrics=shown)
            training.after(before, step)


def exploration(settings: ControlSettings, step: int) -> float:
    """ε at a step: on a straight line from the first, at step 0, to the last; but 1 until learning begins."""
    if step < settings.learning_starts:
        return 1.0
    done = min(1.0, step / max(1.0, settings.exploration_share * settings.total_steps))
    return settings.exploration_first + done * (settings.exploration_last - settings.exploration_first)
