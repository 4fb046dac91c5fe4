"""Planning in random sparse processes (5 actions, 10 successors, γ 0.99): ours and three libraries, in turn.

    python benchmarks/planning.py --python PYTHON [--states 10000 100000] [--rounds 5]

PYTHON is an environment with benchmarks/planning-requirements.txt. All solve to 1e-6; the largest error of the values
against ours to 1e-10 is printed beside the time. ``--states 1000000 --sides trueup`` is the large one.
``--evaluate 250000`` instead evaluates a policy, on a chain and on a random graph.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from planning_side import GAMMA, NUM_ACTIONS, SIDES

from trueup.mdp import exact
from trueup.mdp.generators import chain, garnet
from trueup.mdp.planning import modified_policy_iteration

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="Python of the peers' environment")
    parser.add_argument("--states", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--evaluate", type=int, metavar="STATES", help="time evaluations of a policy instead")
    arguments = parser.parse_args()
    if arguments.evaluate:
        evaluate(arguments.evaluate, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        for num_states in arguments.states:
            file, truth = Path(folder) / "process.npz", Path(folder) / "truth.npy"
            mdp = garnet(1, num_states=num_states, num_actions=NUM_ACTIONS, num_successors=10, gamma=GAMMA)
            matrix = mdp.transitions
            parts = {name: getattr(matrix, name) for name in ("data", "indices", "indptr", "shape")}
            np.savez(file, rewards=mdp.expected_rewards, **parts)
            np.save(truth, modified_policy_iteration(mdp, tolerance=1e-10).values)
            del mdp, matrix, parts
            outcomes: dict[str, list[dict[str, float]]] = {side: [] for side in arguments.sides}
            for _ in range(arguments.rounds):
                for side in arguments.sides:
                    python = sys.executable if side == "trueup" else arguments.python
                    command = [python, str(HERE / "planning_side.py"), side, str(file), str(truth)]
                    environment = os.environ | {"OMP_NUM_THREADS": "1"}
                    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                    outcomes[side].append(json.loads(ended.stdout.splitlines()[-1]))
            for side, runs in outcomes.items():
                seconds = [run["seconds"] for run in runs]
                print(
                    f"{num_states:9,} states  {side:12} {statistics.median(seconds):8.4f} s "
                    f"({min(seconds):.4f}-{max(seconds):.4f})  error {max(run['error'] for run in runs):.1e}  "
                    f"peak {max(run['gib'] for run in runs):.1f} GiB",
                    flush=True,
                )


def evaluate(num_states: int, rounds: int) -> None:
    """Values of the only policy of a chain, and of a random graph with 10 successors."""
    earned = np.random.default_rng(0).normal(size=num_states).tolist()
    nothing_to_decide = np.zeros(num_states, dtype=int)
    for gamma in (GAMMA, 0.999):
        for name, mdp in (
            ("chain", chain(earned, left=0.4, right=0.4, gamma=gamma)),
            ("random", garnet(1, num_states=num_states, num_actions=1, num_successors=10, gamma=gamma)),
        ):
            seconds, residual = [], 0.0
            for _ in range(rounds):
                began = time.perf_counter()
                values = exact.values(mdp, nothing_to_decide)
                seconds.append(time.perf_counter() - began)
                residual = max(residual, exact.bellman_residual(mdp, nothing_to_decide, values))
            print(
                f"{num_states:9,} states  {name:6} gamma {gamma:5}  {statistics.median(seconds):6.3f} s "
                f"({min(seconds):.3f}-{max(seconds):.3f})  residual {residual:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
