"""One side of ``planning.py``: load a process, solve it, and say how long the solving took and how good the values are.

    python benchmarks/planning_side.py SIDE PROCESS.npz TRUTH.npy

What a library needs to be given the process in its own form is not timed; a library that compiles is warmed up first.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse

NUM_ACTIONS, GAMMA, TOLERANCE = 5, 0.99, 1e-6
Ready = tuple[sparse.csr_array, np.ndarray]
"""Transitions [S·A, S] and rewards [S, A]."""


def ours(ready: Ready) -> Callable[[], np.ndarray]:
    from trueup.mdp import TabularMDP
    from trueup.mdp.planning import modified_policy_iteration

    transitions, rewards = ready
    mdp = TabularMDP(transitions=transitions, rewards=rewards, gamma=GAMMA)
    return lambda: modified_policy_iteration(mdp, tolerance=TOLERANCE).values


def quantecon(ready: Ready, evaluations: int = 20) -> Callable[[], np.ndarray]:
    """20 is its default; 10 was the fastest of 5, 10, 20 and 40 at 100,000 states."""
    from quantecon.markov import DiscreteDP

    transitions, rewards = ready
    states, actions = np.divmod(np.arange(rewards.size), NUM_ACTIONS)
    process = DiscreteDP(rewards.ravel(), sparse.csr_matrix(transitions), GAMMA, states, actions)
    return lambda: process.solve(method="modified_policy_iteration", epsilon=TOLERANCE, k=evaluations).v


def mdpsolver(ready: Ready) -> Callable[[], np.ndarray]:
    import mdpsolver as library

    transitions, rewards = ready
    probabilities, columns = (
        array.reshape(len(rewards), NUM_ACTIONS, -1).tolist() for array in (transitions.data, transitions.indices)
    )
    model = library.model()
    model.mdp(discount=GAMMA, rewards=rewards.tolist(), tranMatProbs=probabilities, tranMatColumns=columns)

    def solve() -> np.ndarray:
        model.solve(algorithm="mpi", tolerance=TOLERANCE, parallel=False)
        return np.array(model.getValueVector())

    return solve


def mdptoolbox(ready: Ready) -> Callable[[], np.ndarray]:
    from hiive.mdptoolbox.mdp import ValueIteration

    transitions, rewards = ready

    class WithoutBound(ValueIteration):
        """Its bound of the number of iterations is quadratic in the states: not done after 5 minutes at 100,000."""

        def _boundIter(self, epsilon: float) -> None:
            del epsilon

    of_actions = [sparse.csr_matrix(transitions[action::NUM_ACTIONS]) for action in range(NUM_ACTIONS)]
    solver: Any = WithoutBound(of_actions, rewards, GAMMA, epsilon=TOLERANCE, max_iter=100_000, skip_check=True)

    def solve() -> np.ndarray:
        # It stops once all values change by the same amount, with the right policy and values that are off by a
        # constant: one more sweep and the bounds of MacQueen and Porteus, which it has not, give the constant.
        solver.run()
        values = np.array(solver.V)
        _, swept = solver._bellmanOperator()
        change = np.array(swept) - values
        return np.array(swept) + GAMMA / (1 - GAMMA) * (change.min() + change.max()) / 2

    return solve


SIDES = {
    "trueup": ours,
    "quantecon": quantecon,
    "quantecon-10": partial(quantecon, evaluations=10),
    "mdpsolver": mdpsolver,
    "mdptoolbox": mdptoolbox,
}


def main() -> None:
    side, file, truth = sys.argv[1:]
    with np.load(file) as arrays:
        shape = tuple(arrays["shape"])
        transitions = sparse.csr_array((arrays["data"], arrays["indices"], arrays["indptr"]), shape=shape)
        rewards = arrays["rewards"]
    small = np.arange(20)
    rows = sparse.csr_array(
        (np.full(200, 0.5), (small[:, None] + [0, 1]).repeat(5, 0).ravel() % 20, np.arange(0, 201, 2)), shape=(100, 20)
    )
    SIDES[side]((rows, rewards[:20]))()
    solve = SIDES[side]((transitions, rewards))
    began = time.perf_counter()
    values = solve()
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "seconds": seconds,
                "error": float(np.abs(values - np.load(truth)).max()),
                "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
