"""A softmax policy that follows its own gradient, by whole episodes or step by step. NumPy and torch.

A logit for each state and action, R independent runs side by side; losses are those of
``trueup.objectives.policy_gradient``, gradients autograd's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from trueup.errors import DataError
from trueup.mdp.estimation import Learned, Look, Looks, tensor
from trueup.mdp.exact import expected_return
from trueup.mdp.sampling import Runs, Sampler, episodes
from trueup.mdp.tabular import TabularMDP, check_choice
from trueup.mdp.trajectories import Trajectories
from trueup.objectives.policy_gradient import reinforce as reinforce_loss
from trueup.objectives.policy_gradient import reinforce_discounted
from trueup.objectives.reduce import sequence_sum
from trueup.objectives.returns import discounted_returns, discounts_from, elapsed_discounts
from trueup.objectives.value import td_target

Baseline = Literal["none", "mean", "value"]


def exact_returns(mdp: TabularMDP, learned: Learned) -> Float[np.ndarray, "e r"]:
    """The true return of every policy of the curve. Raises ``DataError`` as ``exact.values``."""
    return np.array([[expected_return(mdp, policy) for policy in policies] for policies in learned.curve])


def reinforce(
    mdp: TabularMDP,
    *,
    num_updates: int,
    num_runs: int = 10,
    episodes_per_update: int = 8,
    horizon: int = 1000,
    learning_rate: float = 0.5,
    baseline: Baseline = "value",
    baseline_step_size: float = 0.1,
    discount_in_front: bool = True,
    num_looks: int = 50,
    seed: int = 0,
    look: Look | None = None,
) -> Learned:
    """REINFORCE on whole episodes, with what an action brought beyond a baseline.

        θ ← θ + α · mean over episodes of Σ_t γ^t · (G_t − b(s_t)) · ∇log π(a_t|s_t)

    ``baseline``: none, the mean return of the update's other episodes' first steps ("mean"), or a value for each state
    that moves to the returns seen there ("value"). ``discount_in_front``: with γ^t the expected step is ∇J_γ; without
    is what most implementations take (``softmax.dropped_discount_gradient``). Raises ``DataError`` for no updates, or
    if an episode is cut off at ``horizon``: its returns are unknown.
    Source: Williams 1992; Sutton & Barto 2018, §13.3 and 13.4.
    """
    check_choice("baseline", baseline, Baseline)
    sampler = Sampler(mdp, np.random.default_rng(seed))
    logits = torch.zeros(num_runs, mdp.num_states, mdp.num_actions, dtype=torch.float64, requires_grad=True)
    values = np.zeros((num_runs, mdp.num_states))
    steps, steps_at_looks = 0.0, []
    owner = np.repeat(np.arange(num_runs), episodes_per_update)  # of each episode
    looks = Looks(num_updates, num_looks, look)
    for number in range(1, num_updates + 1):
        policies = torch.softmax(logits.detach(), -1).numpy()
        paths = episodes(
            sampler,
            lambda rows, states, policies=policies: sampler.choices(policies[owner[rows], states]),
            len(owner),
            horizon,
        )
        if paths.truncated.any():
            raise DataError(
                f"{int(paths.truncated.sum())} episodes were cut off at {horizon} steps: their returns are unknown",
                way_out="raise the horizon; where no episode ends, take actor_critic",
            )
        steps += paths.mask.sum() / num_runs
        mask, terminated = tensor(paths.mask), tensor(paths.terminated)
        discounts = discounts_from(terminated, mdp.gamma, dtype=torch.float64)
        returns = discounted_returns(tensor(paths.rewards), discounts, mask=mask)
        rows = owner[:, None]
        compared = _baseline(baseline, returns.numpy(), values[rows, paths.states], episodes_per_update)
        logprobs = torch.log_softmax(logits, -1)[rows, paths.states, paths.actions]
        advantages = returns - tensor(compared)
        if discount_in_front:
            weights = elapsed_discounts(terminated, mdp.gamma, mask, dtype=torch.float64)
            losses = reinforce_discounted(logprobs, advantages, weights)
        else:
            losses = reinforce_loss(logprobs, advantages)
        (gradient,) = torch.autograd.grad(sequence_sum(losses, mask).sum() / episodes_per_update, logits)
        with torch.no_grad():
            logits -= learning_rate * gradient
        if baseline == "value":
            _move(values, np.broadcast_to(rows, paths.mask.shape), paths, returns.numpy(), baseline_step_size)
        if looks.due(number):
            steps_at_looks.append(steps)
            looks.take(torch.softmax(logits.detach(), -1).numpy())
    return replace(looks.learned(), steps=np.round(steps_at_looks).astype(int))


def _baseline(kind: Baseline, returns: np.ndarray, values: np.ndarray, group: int) -> np.ndarray:
    """b of every step, [N, T]."""
    if kind == "value":
        return values
    if kind == "none" or group == 1:
        return np.zeros_like(returns)
    first = returns[:, 0].reshape(-1, group)
    others = (first.sum(1, keepdims=True) - first) / (group - 1)
    return np.broadcast_to(others.reshape(-1, 1), returns.shape)


def _move(values: np.ndarray, owners: np.ndarray, paths: Trajectories, returns: np.ndarray, step_size: float) -> None:
    """Each state's value, in each run, moves towards the mean of the returns seen there."""
    sums, counts = np.zeros_like(values), np.zeros_like(values)
    place = owners[paths.mask], paths.states[paths.mask]
    np.add.at(sums, place, returns[paths.mask])
    np.add.at(counts, place, 1)
    seen = counts > 0
    values[seen] += step_size * (sums[seen] / counts[seen] - values[seen])


def actor_critic(
    mdp: TabularMDP,
    *,
    num_steps: int,
    num_runs: int = 10,
    learning_rate: float = 0.1,
    critic_step_size: float = 0.1,
    discount_in_front: bool = False,
    num_looks: int = 50,
    seed: int = 0,
    look: Look | None = None,
) -> Learned:
    """One-step actor-critic: after every step, the critic's surprise moves both.

        δ = r + γ·V(s') − V(s),    V(s) += β·δ,    θ += α·γ^t·δ·∇log π(a|s)

    ``discount_in_front``: with γ^t (t counts from the episode's first step), else without. Raises ``DataError`` for no
    steps, or if an episode can begin in a terminal state. Source: Sutton & Barto 2018, §13.5.
    """
    runs, every = Runs(mdp, num_runs, seed), np.arange(num_runs)
    logits = torch.zeros(num_runs, mdp.num_states, mdp.num_actions, dtype=torch.float64)
    values, elapsed = np.zeros((num_runs, mdp.num_states)), np.ones(num_runs)
    looks = Looks(num_steps, num_looks, look)
    for number in range(1, num_steps + 1):
        states = runs.states
        here = logits[every, states].requires_grad_()
        taken = runs.step(runs.sampler.choices(torch.softmax(here.detach(), -1).numpy()))
        discounts = tensor(mdp.gamma * ~taken.terminated)
        target = td_target(tensor(taken.rewards), discounts, tensor(values[every, taken.next_states])).numpy()
        surprise = target - values[every, states]
        logprobs = torch.log_softmax(here, -1)[every, taken.actions]
        weights = tensor(elapsed if discount_in_front else np.ones(num_runs))
        losses = reinforce_discounted(logprobs[:, None], tensor(surprise)[:, None], weights[:, None])
        (gradient,) = torch.autograd.grad(losses.sum(), here)
        logits[every, states] -= learning_rate * gradient
        values[every, states] += critic_step_size * surprise
        elapsed = np.where(taken.terminated, 1.0, elapsed * mdp.gamma)
        if looks.due(number):
            looks.take(torch.softmax(logits, -1).numpy())
    return looks.learned()
