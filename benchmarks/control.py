"""Long training runs in Gymnasium environments, ours and CleanRL's, one result file for each.

    python benchmarks/control.py mujoco                          # HalfCheetah, Hopper, Walker2d: five seeds, 1M steps
    python benchmarks/control.py mujoco --cleanrl FOLDER --python PYTHON    # the same by CleanRL's script
    python benchmarks/control.py table1 | discrete               # see BATCHES

A batch is resumable: a run whose result is there is left out, one of ours that was stopped goes on from its last
checkpoint. Results lie in benchmarks/results/control and belong to the repository; ``control_report.py`` says what came
out. Runs lie in build/control. FOLDER is a checkout of https://github.com/vwxyzjn/cleanrl that runs with Gymnasium 1.x,
PYTHON an environment that has what it needs (benchmarks/control-requirements.txt).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "control"
RUNS = ROOT / "build" / "control"
LAST = 100
"""Episodes whose mean return is a run's score."""


@dataclass(frozen=True)
class Job:
    """One environment, learned with several seeds."""

    batch: str
    name: str
    env: str
    total_steps: int
    seeds: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def result(self, side: str, seed: int) -> Path:
        return RESULTS / self.batch / f"{side}-{self.name}-seed{seed}.json"


TABLE1 = ("HalfCheetah", "Hopper", "InvertedDoublePendulum", "InvertedPendulum", "Reacher", "Swimmer", "Walker2d")
PAPER = {
    "minibatch_size": 64,
    "gae_lambda": 0.95,
    "normalize_rewards": False,
    "max_grad_norm": None,
    "observation_clip": 5.0,
    "normalize_advantages": "rollout",
}
"""What the code behind the paper's table did and the paper leaves out: no reward scaling, no gradient clip, advantages
normalised over the whole rollout, observations clipped at 5."""
SURROGATES = {
    "none": {"surrogate": "none"},
    "clip-0.2": {"surrogate": "clip", "clip": 0.2, "clip_schedule": "linear"},
    "adaptive-kl-0.01": {"surrogate": "adaptive_kl", "kl_target": 0.01},
    "kl-1": {"surrogate": "kl", "kl_coef": 1.0},
}
BATCHES: dict[str, list[Job]] = {
    "mujoco": [
        Job("mujoco", env, f"{env}-v5", 1_000_000, (1, 2, 3, 4, 5)) for env in ("HalfCheetah", "Hopper", "Walker2d")
    ],
    "table1": [
        Job("table1", f"{env}-{name}", f"{env}-v5", 300_000, (1, 2, 3, 4, 5), PAPER | surrogate)
        for env in TABLE1
        for name, surrogate in SURROGATES.items()
    ],
    "discrete": [
        Job("discrete", "ppo-CartPole", "CartPole-v1", 100_000, (1, 2, 3, 4, 5)),
        Job("discrete", "ppo-LunarLander", "LunarLander-v3", 1_000_000, (1, 2, 3)),
        Job("discrete", "dqn-CartPole", "CartPole-v1", 100_000, (1, 2, 3, 4, 5), {"algorithm": "dqn"}),
        Job("discrete", "dqn-LunarLander", "LunarLander-v3", 300_000, (1, 2, 3), {"algorithm": "dqn"}),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", choices=BATCHES)
    parser.add_argument("--cleanrl", type=Path, help="folder of CleanRL's checkout: run its scripts instead of ours")
    parser.add_argument("--python", default=sys.executable, help="Python that CleanRL's scripts run with")
    parser.add_argument("--only", default="", help="jobs whose name holds this")
    arguments = parser.parse_args()
    if arguments.batch == "table1" and not arguments.cleanrl:
        chance()
    for job in BATCHES[arguments.batch]:
        if arguments.only not in job.name:
            continue
        if arguments.cleanrl:
            for seed in job.seeds:
                if not job.result("cleanrl", seed).exists():
                    theirs(job, seed, arguments.cleanrl, arguments.python)
        elif missing := tuple(seed for seed in job.seeds if not job.result("trueup", seed).exists()):
            ours(replace(job, seeds=missing))


def ours(job: Job) -> None:
    """All seeds of the job that are missing side by side, with an evaluation of 100 episodes behind them."""
    import torch

    from trueup.control.presets import preset
    from trueup.control.settings import ControlSettings
    from trueup.control.train import train
    from trueup.runs.folder import read_metrics

    torch.set_num_threads(1)
    algorithm = job.settings.get("algorithm", "ppo")
    output = RUNS / job.batch / "-".join([job.name, *map(str, job.seeds)])
    settings = (
        preset(algorithm, job.env)
        | job.settings
        | {
            "env": job.env,
            "algorithm": algorithm,
            "total_steps": job.total_steps,
            "seeds": job.seeds,
            "output": str(output),
            "eval_episodes": 100,
            "save_every": max(job.total_steps // 10, 1),
            "resume": "auto",
        }
    )
    began = time.perf_counter()
    result = train(ControlSettings(**settings))
    seconds = time.perf_counter() - began
    lines = [line for line in read_metrics(result.folder / "metrics.jsonl") if "return_100" in line]
    for seed in job.seeds:
        suffix = f"/{seed}" if len(job.seeds) > 1 else ""
        curve = [[line["step"], round(line[f"return_100{suffix}"], 2)] for line in lines]
        every = max(1, len(curve) // 100)
        write(
            job.result("trueup", seed),
            job,
            seed,
            seconds=round(seconds, 1),
            seconds_are_of=f"all {len(job.seeds)} seeds together",
            return_100=curve[-1][1],
            eval_return=result.metrics[f"eval_return{suffix}"],
            curve=[*curve[::-1][::every][::-1]],
        )


def theirs(job: Job, seed: int, folder: Path, python: str) -> None:
    """CleanRL's ``ppo_continuous_action.py`` or ``ppo.py`` with its own settings; the curve is read from its output."""
    continuous = job.batch != "discrete"
    script = folder.resolve() / "cleanrl" / ("ppo_continuous_action.py" if continuous else "ppo.py")
    where = RUNS / "cleanrl"
    where.mkdir(parents=True, exist_ok=True)
    command = [python, str(script), "--env-id", job.env, "--total-timesteps", str(job.total_steps)]
    command += ["--seed", str(seed), "--no-cuda"]
    began = time.perf_counter()
    ended = subprocess.run(
        command, cwd=where, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    seconds = time.perf_counter() - began
    episodes = [
        (int(step), float(total))
        for step, total in re.findall(r"global_step=(\d+), episodic_return=\[?([-\d.e+]+)", ended.stdout)
    ]
    curve = [
        [
            step,
            round(sum(total for _, total in episodes[max(0, index - LAST + 1) : index + 1]) / min(LAST, index + 1), 2),
        ]
        for index, (step, _) in enumerate(episodes)
    ]
    every = max(1, len(curve) // 100)
    write(
        job.result("cleanrl", seed),
        job,
        seed,
        seconds=round(seconds, 1),
        return_100=curve[-1][1],
        curve=curve[::-1][::every][::-1],
        command=" ".join(["python", script.name, *command[2:]]),
    )


def write(path: Path, job: Job, seed: int, **measured: Any) -> None:
    from importlib import metadata

    record = {
        "env": job.env,
        "seed": seed,
        "total_steps": job.total_steps,
        "settings": job.settings,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "packages": {name: metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")},
        **measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    aside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    aside.rename(path)
    print(f"{path.relative_to(ROOT)}: {measured['return_100']}", flush=True)


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def chance() -> None:
    """What random actions bring in the environments of table 1: the mean return of 100 episodes."""
    from statistics import fmean

    from trueup.control.environments import make_environment

    path = RESULTS / "table1" / "random.json"
    if path.exists():
        return
    scores = {}
    for name in TABLE1:
        environment = make_environment(f"{name}-v5")
        environment.action_space.seed(0)
        totals = []
        for episode in range(100):
            environment.reset(seed=episode)
            total, ended = 0.0, False
            while not ended:
                _, reward, terminated, truncated, _ = environment.step(environment.action_space.sample())
                total, ended = total + float(reward), terminated or truncated
            totals.append(total)
        scores[name] = round(fmean(totals), 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
