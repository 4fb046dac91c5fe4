"""The benchmarks of agents and planning: what a batch leaves, how table 1 is scored, that the sides agree."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[ModuleType, ModuleType]:
    """``control`` and ``control_report``, with results in a folder of their own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import control_report

    import control

    for module in (control, control_report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(control, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(control, "ROOT", tmp_path)
    return control, control_report


def test_a_batch_is_done_once(
    modules: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    control, report = modules
    short = {"rollout_steps": 64, "num_envs": 2, "num_epochs": 1, "quiet": True}
    job = control.Job("short", "CartPole", "CartPole-v1", 384, (1, 2), short)
    monkeypatch.setattr(control, "BATCHES", {"short": [job]})
    monkeypatch.setattr(report, "BATCHES", {"short": [job]})
    monkeypatch.setattr(sys, "argv", ["control.py", "short"])
    control.main()
    first = [json.loads(job.result("trueup", seed).read_text()) for seed in (1, 2)]
    assert [record["seed"] for record in first] == [1, 2]
    assert all(record["curve"][-1][0] == 384 for record in first)
    assert first[0]["eval_return"] != first[1]["eval_return"]
    capsys.readouterr()
    control.main()
    assert capsys.readouterr().out == ""
    lines = list(report.summary())
    assert len(lines) == 2
    assert f"{np.mean([record['eval_return'] for record in first]):,.1f}" in lines[1]


def test_cleanrls_output_is_read(modules: Any, tmp_path: Path) -> None:
    control, _ = modules
    script = tmp_path / "cleanrl" / "ppo_continuous_action.py"
    script.parent.mkdir()
    script.write_text(
        "for step, total in ((1000, -50.5), (2000, '[1.5e2]'), (3000, 10)):\n"
        "    print(f'global_step={step}, episodic_return={total}')\nprint('SPS: 7')\n"
    )
    job = control.Job("mujoco", "Hopper", "Hopper-v5", 3000, (4,))
    control.theirs(job, 4, tmp_path, sys.executable)
    record = json.loads(job.result("cleanrl", 4).read_text())
    assert record["curve"] == [[1000, -50.5], [2000, 49.75], [3000, 36.5]]
    assert record["return_100"] == 36.5


def test_table_1_is_scored_as_in_the_paper(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two environments, two surrogates, two seeds. Scaled by hand: 0 is chance, 1 the best run."""
    control, report = modules
    surrogates, envs = ("none", "clip-0.2"), ("Hopper", "Swimmer")
    jobs = [control.Job("table1", f"{env}-{name}", f"{env}-v5", 1, (1, 2), {}) for env in envs for name in surrogates]
    monkeypatch.setattr(report, "BATCHES", {"table1": jobs})
    monkeypatch.setattr(report, "TABLE1", envs)
    monkeypatch.setattr(report, "SURROGATES", {name: {} for name in surrogates})
    returns = {
        "Hopper-none": (0, 20),
        "Hopper-clip-0.2": (60, 110),
        "Swimmer-none": (-3, -1),
        "Swimmer-clip-0.2": (5, 9),
    }
    for job in jobs:
        for seed, value in zip(job.seeds, returns[job.name], strict=True):
            control.write(job.result("trueup", seed), job, seed, return_100=float(value), curve=[[1, value]])
    (report.RESULTS / "table1" / "random.json").write_text(json.dumps({"Hopper": 10.0, "Swimmer": -1.0}))
    none, clip = (line.split() for line in report.table1())
    # none: Hopper (−0.1, 0.1), Swimmer (−0.2, 0); clip: Hopper (0.5, 1), Swimmer (0.6, 1)
    assert float(none[3]) == pytest.approx(-0.05)
    assert float(clip[3]) == pytest.approx(0.775, abs=0.006)
    assert none[none.index("paper") + 1] == "-0.39"
    # variances within environments 0.02 and 0.02, so √(0.02/4) with 2 degrees of freedom
    half = stats.t.ppf(0.975, 2) * math.sqrt(0.02 / 4)
    assert float(none[4].strip("(")) == pytest.approx(-0.05 - half, abs=0.006)


@pytest.mark.parametrize("side", ["trueup"])
def test_planning_is_timed_and_checked(side: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "planning.py"), "--states", "300", "--rounds", "1", "--sides", side]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "300 states" in output
    assert float(output.split("error")[1].split()[0]) < 1e-6
