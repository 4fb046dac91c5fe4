"""Replayed experience: the last transitions of every run, drawn evenly or by priority.

A transition spans up to n steps: the discounted sum of their rewards, and γ to the power of their number (0 where the
episode terminated), which stands in front of the value of the state behind them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from trueup.control.environments import Step


class Transitions(NamedTuple):
    """B transitions of each of S runs."""

    observations: Float[np.ndarray, "s b d"]
    actions: Int[np.ndarray, "s b"]
    rewards: Float[np.ndarray, "s b"]
    discounts: Float[np.ndarray, "s b"]
    next_observations: Float[np.ndarray, "s b d"]


class Replay:
    """The last ``capacity`` transitions of each run. All runs have the same number of them."""

    def __init__(self, num_runs: int, capacity: int, num_inputs: int) -> None:
        self.capacity, self.num_added = capacity, np.zeros(num_runs, np.int64)
        shape = num_runs, capacity
        self.arrays = Transitions(
            np.zeros((*shape, num_inputs), np.float32),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
            np.zeros((*shape, num_inputs), np.float32),
        )

    @property
    def size(self) -> Int[np.ndarray, " s"]:
        """Transitions that each run has."""
        return np.minimum(self.num_added, self.capacity)

    def add(self, run: int, transition: Sequence[Any]) -> int:
        """Keep a transition, in the place of the oldest; returns the place."""
        place = int(self.num_added[run]) % self.capacity
        for array, value in zip(self.arrays, transition, strict=True):
            array[run, place] = value
        self.num_added[run] += 1
        return place

    def at(self, places: Int[np.ndarray, "s b"]) -> Transitions:
        runs = np.arange(len(places))[:, None]
        return Transitions(*(array[runs, places] for array in self.arrays))

    def state(self) -> dict[str, Any]:
        """What is there, and no more of the arrays than that."""
        filled = int(self.size.max())
        arrays = {name: torch.from_numpy(array[:, :filled].copy()) for name, array in self.arrays._asdict().items()}
        return {"arrays": arrays, "num_added": self.num_added.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.num_added[:] = state["num_added"]
        for name, array in self.arrays._asdict().items():
            kept = state["arrays"][name].numpy()
            array[:, : kept.shape[1]] = kept


class Spans:
    """Makes transitions of n steps from single ones: a row's open steps wait for the rewards that follow."""

    def __init__(self, num_rows: int, n: int, gamma: float) -> None:
        self.n, self.gamma = n, gamma
        self.open: list[deque[list[Any]]] = [deque() for _ in range(num_rows)]

    def add(
        self,
        row: int,
        observation: np.ndarray,
        action: int,
        reward: float,
        following: np.ndarray,
        *,
        terminated: bool,
        truncated: bool,
    ) -> list[tuple[Any, ...]]:
        """One step of a row; returns the transitions that are complete with it."""
        waiting = self.open[row]
        waiting.append([observation, action, 0.0, 1.0])
        for span in waiting:
            span[2] += span[3] * reward
            span[3] *= self.gamma
        complete = []
        while waiting and (terminated or truncated or len(waiting) == self.n):
            observation, action, total, discount = waiting.popleft()
            complete.append((observation, action, total, 0.0 if terminated else discount, following))
        return complete

    def state(self) -> list[Any]:
        return [
            [
                [torch.from_numpy(observation.copy()), int(action), float(total), float(discount)]
                for observation, action, total, discount in waiting
            ]
            for waiting in self.open
        ]

    def restore(self, state: Sequence[Any]) -> None:
        self.open = [
            deque([observation.numpy(), action, total, discount] for observation, action, total, discount in waiting)
            for waiting in state
        ]


class Priorities:
    """Draws places in proportion to p^α, p the size of the last TD error; a new one gets the largest so far.

        P(i) = p_i^α / Σ_k p_k^α,    w_i = (N·P(i))^{−β} / max_j w_j

    Sums of p^α stand in a binary tree, so that drawing and changing take log₂(capacity) steps.
    Source: Schaul et al. 2016 (arXiv 1511.05952), §3.3 (proportional prioritisation) and §3.4.
    """

    def __init__(self, num_runs: int, capacity: int, alpha: float) -> None:
        self.alpha, self.depth = alpha, max(1, int(np.ceil(np.log2(capacity))))
        self.leaves = 1 << self.depth
        self.tree = np.zeros((num_runs, 2 * self.leaves))
        self.largest = np.ones(num_runs)

    def add(self, run: int, place: int) -> None:
        self._set(np.array([[place]]), np.array([[self.largest[run] ** self.alpha]]), np.array([[run]]))

    def change(self, places: Int[np.ndarray, "s b"], errors: Float[np.ndarray, "s b"]) -> None:
        """Set priorities to the sizes of TD errors."""
        sizes = np.abs(errors) + 1e-6
        self.largest = np.maximum(self.largest, sizes.max(1))
        self._set(places, sizes**self.alpha, np.arange(len(places))[:, None])

    def draw(
        self, uniforms: Float[np.ndarray, "s b"], sizes: Int[np.ndarray, " s"], beta: float
    ) -> tuple[Int[np.ndarray, "s b"], Float[np.ndarray, "s b"]]:
        """Places, and the weights that undo the bias; one from each of B equal parts of the total."""
        runs, number = np.arange(len(uniforms))[:, None], uniforms.shape[1]
        total = self.tree[:, 1:2]
        left = (np.arange(number) + uniforms) / number * total
        nodes = np.ones(uniforms.shape, np.int64)
        for _ in range(self.depth):
            nodes = 2 * nodes
            below = self.tree[runs, nodes]
            right = left >= below
            left = np.where(right, left - below, left)
            nodes = nodes + right
        # Rounding may lead one step beyond the last place that is filled.
        places = np.minimum(nodes - self.leaves, sizes[:, None] - 1)
        chances = self.tree[runs, places + self.leaves] / total
        weights = (sizes[:, None] * chances) ** -beta
        return places, weights / weights.max(1, keepdims=True)

    def _set(self, places: np.ndarray, priorities: np.ndarray, runs: np.ndarray) -> None:
        nodes = places + self.leaves
        self.tree[runs, nodes] = priorities
        for _ in range(self.depth):
            nodes = nodes // 2
            self.tree[runs, nodes] = self.tree[runs, 2 * nodes] + self.tree[runs, 2 * nodes + 1]

    def state(self) -> dict[str, Any]:
        return {"leaves": torch.from_numpy(self.tree[:, self.leaves :].copy()), "largest": self.largest.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.largest = np.array(state["largest"])
        self.tree[:, self.leaves :] = state["leaves"].numpy()
        for level in reversed(range(self.depth)):
            nodes = np.arange(1 << level, 2 << level)
            self.tree[:, nodes] = self.tree[:, 2 * nodes] + self.tree[:, 2 * nodes + 1]


def following_observation(step: Step, row: int) -> np.ndarray:
    """What the row's step led to, although its next episode may have begun."""
    final = step.final_observations.get(row)
    return step.observations[row] if final is None else final
