"""Planning in random sparse processes (5 actions, 10 successors, γ 0.99): ours and three libraries, in turn.

    python benchmarks/planning.py --python PYTHON [--states 10000 100000] [--rounds 5]

PYTHON is an environment with benchmarks/planning-requirements.txt. All solve to 1e-6; the largest error of the values
against ours to 1e-10 is printed beside the time. ``--states 1000000 --sides trueup`` is the large one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from planning_side import GAMMA, NUM_ACTIONS, SIDES

from trueup.mdp.generators import garnet
from trueup.mdp.planning import modified_policy_iteration

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="Python of the peers' environment")
    parser.add_argument("--states", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
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
                    f"{num_states:9,} states  {side:12} {statistics.median(seconds):8.3f} s "
                    f"({min(seconds):.3f}-{max(seconds):.3f})  error {max(run['error'] for run in runs):.1e}  "
                    f"peak {max(run['gib'] for run in runs):.1f} GiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
