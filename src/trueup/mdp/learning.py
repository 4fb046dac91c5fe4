"""Good behaviour from experience alone: by values of actions, or by a policy's own gradient. NumPy.

R independent runs learn side by side, each from its own steps, so that every result comes with its spread. Targets and
losses are those of ``trueup.objectives``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from trueup.errors import DataError
from trueup.mdp.estimation import Learned, Look, Looks, StepSize, tensor
from trueup.mdp.sampling import Runs, Steps
from trueup.mdp.tabular import TabularMDP, check_choice
from trueup.objectives.value import (
    double_q_learning_target,
    expected_sarsa_target,
    sarsa_target,
)

Method = Literal["sarsa", "expected_sarsa", "q_learning", "double_q_learning"]


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """ε of an ε-greedy policy: from ``first`` to ``last`` along a straight line over the first ``share`` of all steps.

    Raises ``DataError`` unless all three lie in [0, 1].
    """

    first: float = 1.0
    last: float = 0.05
    share: float = 0.5

    def __post_init__(self) -> None:
        if not all(0 <= number <= 1 for number in (self.first, self.last, self.share)):
            raise DataError(f"{self}", way_out="choose all three in [0, 1]")

    def at(self, number: int, of: int) -> float:
        done = min(1.0, number / max(1.0, self.share * of))
        return self.first + done * (self.last - self.first)


def learn_action_values(
    mdp: TabularMDP,
    *,
    method: Method = "q_learning",
    num_steps: int,
    num_runs: int = 20,
    step_size: StepSize | None = None,
    exploration: Exploration | None = None,
    num_looks: int = 50,
    seed: int = 0,
    look: Look | None = None,
) -> Learned:
    """Q from the steps of an ε-greedy policy that follows what it has learned so far.

        Q(s, a) ← Q(s, a) + α·(y − Q(s, a)),    y one of

        sarsa              r + γ·Q(s', a'), a' the next action taken              on-policy
        expected_sarsa     r + γ·Σ_a' π_ε(a'|s')·Q(s', a')                        on-policy
        q_learning         r + γ·max_a' Q(s', a')                                 off-policy: learns of greedy behaviour
        double_q_learning  r + γ·Q_2(s', argmax_a' Q_1(s', a')), the roles by lot  off-policy, without its upward bias

    Ties between actions are broken by lot. What double_q_learning gives is the mean of its two tables. Raises
    ``DataError`` for no steps, or if an episode can begin in a terminal state.
    Source: Sutton & Barto 2018, §6.4–6.7; ``trueup.objectives.value`` for each target's.
    """
    check_choice("method", method, Method)
    step_size, exploration = step_size or StepSize(), exploration or Exploration()
    runs, every = Runs(mdp, num_runs, seed), np.arange(num_runs)
    rng = runs.sampler.rng
    tables = np.zeros((2 if method == "double_q_learning" else 1, num_runs, mdp.num_states, mdp.num_actions))
    counts = np.zeros_like(tables)

    def acting(states: np.ndarray, number: int) -> np.ndarray:
        return greedy_but(tables[:, every, states].mean(0), exploration.at(number, num_steps), rng)

    looks = Looks(num_steps, num_looks, look)
    actions = runs.sampler.choices(acting(runs.states, 0))
    for number in range(1, num_steps + 1):
        taken = runs.step(actions)
        probabilities = acting(taken.next_states, number)
        following = runs.sampler.choices(probabilities)
        updated = rng.integers(len(tables), size=num_runs)
        targets = _targets(method, mdp.gamma, taken, tables, updated, following, probabilities)
        place = updated, every, taken.states, taken.actions
        counts[place] += 1
        tables[place] += step_size.at(counts[place]) * (targets - tables[place])
        begun = runs.sampler.choices(acting(runs.states, number)) if taken.terminated.any() else following
        actions = np.where(taken.terminated, begun, following)
        if looks.due(number):
            looks.take(tables.mean(0))
    return looks.learned()


def greedy_but(q: Float[np.ndarray, "r a"], epsilon: float, rng: np.random.Generator) -> Float[np.ndarray, "r a"]:
    """Probabilities of the ε-greedy policy: ε shared by all actions, 1 − ε for the best; of equals one by lot."""
    best = np.where(q == q.max(-1, keepdims=True), rng.random(q.shape), -1.0).argmax(-1)
    return epsilon / q.shape[1] + (1 - epsilon) * np.eye(q.shape[1])[best]


def _targets(
    method: Method,
    gamma: float,
    taken: Steps,
    tables: np.ndarray,
    updated: np.ndarray,
    following: np.ndarray,
    probabilities: np.ndarray,
) -> np.ndarray:
    every = np.arange(len(updated))
    rewards, discounts = tensor(taken.rewards), tensor(gamma * ~taken.terminated)
    next_q = tensor(tables[updated, every, taken.next_states])
    if method == "sarsa":
        return sarsa_target(rewards, discounts, next_q, tensor(following)).numpy()
    if method == "expected_sarsa":
        return expected_sarsa_target(rewards, discounts, next_q, tensor(probabilities)).numpy()
    # The other of two tables, or the same if there is one: then it is Q-learning's target.
    other = tensor(tables[updated - 1, every, taken.next_states])
    return double_q_learning_target(rewards, discounts, next_q, other).numpy()
