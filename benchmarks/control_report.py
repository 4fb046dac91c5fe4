"""What the runs of ``control.py`` say: means and intervals, table 1 as the PPO paper scores it, curves as pictures.

python benchmarks/control_report.py [--figures FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from control import BATCHES, RESULTS, SURROGATES, TABLE1, Job
from trueup.runs.sampled import mean_interval

SIDES = {"trueup": "trueup", "cleanrl": "CleanRL"}
PUBLISHED = {"none": -0.39, "clip-0.2": 0.82, "adaptive-kl-0.01": 0.74, "kl-1": 0.71}
"""Schulman et al. 2017 (arXiv 1707.06347), table 1."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, help="folder for the pictures (trueup[plots])")
    arguments = parser.parse_args()
    for line in (*summary(), *table1()):
        print(line)
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        for name in ("mujoco", "discrete"):
            draw([job for job in BATCHES[name] if results(job, "trueup")], arguments.figures / f"control-{name}.svg")


def results(job: Job, side: str) -> list[dict[str, Any]]:
    """What is there, in the order of the seeds."""
    paths = [job.result(side, seed) for seed in job.seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def summary() -> Iterator[str]:
    """A line for each job and side: seeds, means with their 95 % interval over seeds, each seed's own."""
    for jobs in BATCHES.values():
        for job in jobs:
            for side in SIDES:
                runs = results(job, side)
                for what in ("return_100", "eval_return"):
                    scores = [run[what] for run in runs if what in run]
                    if scores:
                        mean, _, high = mean_interval(scores)
                        half = f"± {high - mean:,.1f}" if len(scores) > 1 else ""
                        own = ", ".join(f"{score:,.1f}" for score in scores)
                        yield f"{job.batch:9} {job.name:40} {side:8} {what:12} {mean:10,.1f} {half:10} ({own})"


def table1() -> Iterator[str]:
    """Scores of the surrogates: in each environment 0 is what random actions bring and 1 the best result of any run,
    then the mean over environments and seeds. Intervals: 95 %, Student's t with the variance between seeds within
    environments; the environments, and what is 0 and 1 in them, are taken as they are."""
    found = RESULTS / "table1" / "random.json"
    if not found.exists():
        return
    chance = json.loads(found.read_text(encoding="utf-8"))
    jobs = {job.name: job for job in BATCHES["table1"]}
    scores = {
        surrogate: np.array(
            [[run["return_100"] for run in results(jobs[f"{env}-{surrogate}"], "trueup")] for env in TABLE1]
        )
        for surrogate in SURROGATES
    }
    low = np.array([chance[env] for env in TABLE1])[:, None]
    best = np.max([of_all.max(1) for of_all in scores.values()], axis=0)[:, None]
    for surrogate, of_all in scores.items():
        scaled = (of_all - low) / (best - low)
        within = scaled.var(1, ddof=1).mean() / scaled.size  # of the mean of all: each environment has as many seeds
        half = stats.t.ppf(0.975, scaled.size - len(scaled)) * np.sqrt(within)
        low_end, high_end = scaled.mean() - half, scaled.mean() + half
        by_env = ", ".join(f"{env} {value:.2f}" for env, value in zip(TABLE1, scaled.mean(1), strict=True))
        yield (
            f"table 1   {surrogate:18} {scaled.mean():6.2f} ({low_end:.2f} to {high_end:.2f})  "
            f"paper {PUBLISHED[surrogate]:5.2f}   {by_env}"
        )


def draw(jobs: list[Job], file: Path) -> None:
    """A panel for each job: the mean over seeds of the running return, with its 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(jobs), 3.2), layout="constrained")
    for panel, job in zip(figure.subplots(1, len(jobs), squeeze=False)[0], jobs, strict=True):
        for side, label in SIDES.items():
            curves = [np.array(run["curve"], float) for run in results(job, side)]
            if not curves:
                continue
            steps = np.linspace(max(curve[0, 0] for curve in curves), job.total_steps, 200)
            values = np.array([np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves])
            (line,) = panel.plot(steps, values.mean(0), label=f"{label}, {len(curves)} seeds")
            if len(curves) > 1:
                _, low, high = np.transpose([mean_interval(column) for column in values.T])
                panel.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        panel.set(title=job.name if job.batch == "discrete" else job.env, xlabel="steps in the environment")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize="small")
    figure.axes[0].set_ylabel("return, mean of the last 100 episodes")
    figure.savefig(file)
    print(f"picture {file}")


if __name__ == "__main__":
    main()
