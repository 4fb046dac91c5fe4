"""Steps per second of PPO: ours, Stable-Baselines3's and CleanRL's, in turn, with the same settings on one thread.

    python benchmarks/control_speed.py --python PYTHON --cleanrl FOLDER [--rounds 5]

PYTHON is an environment with benchmarks/control-requirements.txt, FOLDER a checkout of CleanRL that runs with Gymnasium
1.x. Each side learns without evaluation or checkpoints and is timed from the first step to the last; ours writes a line
of metrics after every update, CleanRL TensorBoard records, SB3 nothing. Settings are CleanRL's own: CartPole-v1 with 4
environments × 128 steps, minibatches of 128, 4 epochs; HalfCheetah-v5 with 1 × 2048, 64, 10 epochs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "CartPole-v1": (
        99_840,
        "ppo.py",
        {
            "num_envs": 4,
            "rollout_steps": 128,
            "minibatch_size": 128,
            "num_epochs": 4,
            "learning_rate": 2.5e-4,
            "entropy_coef": 0.01,
        },
    ),
    "HalfCheetah-v5": (
        61_440,
        "ppo_continuous_action.py",
        {"normalize_observations": True, "normalize_rewards": True},
    ),
}
LAST = 20
"""Episodes whose mean return is compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="Python of the peers' environment")
    parser.add_argument("--cleanrl", required=True, type=Path, help="CleanRL's checkout")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side, with seeds 1, 2, …")
    parser.add_argument("--ours", nargs=3, metavar=("ENV", "STEPS", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        print(json.dumps(ours(arguments.ours[0], int(arguments.ours[1]), int(arguments.ours[2]))))
        return
    for env, (steps, script, _) in CASES.items():
        outcomes: dict[str, list[dict[str, Any]]] = {"trueup": [], "sb3": [], "cleanrl": []}
        for seed in range(1, arguments.rounds + 1):
            places = ["--python", arguments.python, "--cleanrl", str(arguments.cleanrl)]
            command = [sys.executable, __file__, *places, "--ours", env, str(steps), str(seed)]
            outcomes["trueup"].append(json.loads(run(command).splitlines()[-1]))
            command = [arguments.python, str(HERE / "control_sb3.py"), env, str(steps), str(seed)]
            outcomes["sb3"].append(json.loads(run(command).splitlines()[-1]))
            command = [arguments.python, str(arguments.cleanrl.resolve() / "cleanrl" / script), "--env-id", env]
            output = run([*command, "--total-timesteps", str(steps), "--seed", str(seed), "--no-cuda"])
            returns = [float(text) for text in re.findall(r"episodic_return=\[?([-\d.e+]+)", output)]
            speed = float(re.findall(r"SPS: (\d+)", output)[-1])
            outcomes["cleanrl"].append({"steps_per_second": speed, "returns": returns})
        show(env, outcomes)


def run(command: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=environment).stdout


def ours(env: str, steps: int, seed: int) -> dict[str, Any]:
    import torch

    from trueup.control.learner import Training
    from trueup.control.settings import ControlSettings
    from trueup.control.train import train

    torch.set_num_threads(1)
    returns: list[float] = []
    report = Training.report

    def listening(training: Training, *arguments: Any) -> Any:
        returns.extend(total for _, total, _ in training.collector.episodes.ended)
        return report(training, *arguments)

    Training.report = listening  # type: ignore[method-assign]
    settings = {"env": env, "value_clip": 0.2, "eval_episodes": 0, "quiet": True, **CASES[env][2]}
    warm = ControlSettings(**settings, total_steps=1, output="warm-up", seeds=(0,))
    train(warm)  # what is imported at the first step is no part of a step
    returns.clear()
    import time

    began = time.perf_counter()
    train(ControlSettings(**settings, total_steps=steps, output="timed", seeds=(seed,)))
    return {"steps_per_second": steps / (time.perf_counter() - began), "returns": returns}


def show(env: str, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    own = [run["steps_per_second"] for run in outcomes["trueup"]]
    for side, runs in outcomes.items():
        speeds = [run["steps_per_second"] for run in runs]
        ratios = [mine / other for mine, other in zip(own, speeds, strict=True)]
        scores = [statistics.fmean(run["returns"][-LAST:]) for run in runs]
        print(
            f"{env:15} {side:8} {statistics.median(speeds):8,.0f} steps/s ({min(speeds):,.0f}-{max(speeds):,.0f})  "
            f"ours / this {statistics.median(ratios):.2f}  "
            f"return of the last {LAST} episodes {statistics.fmean(scores):.0f} "
            f"({', '.join(f'{score:.0f}' for score in scores)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
