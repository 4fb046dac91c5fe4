"""A run that is killed, again and again, and resumed each time writes what a run left alone writes, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from trueup.runs.checkpoint import latest_checkpoint
from trueup.runs.folder import read_lines

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")

TIMES = {"step_seconds", "tokens_per_second"}
RUNS: dict[str, dict[str, Any]] = {
    "sft": {"streaming": True},
    "reward": {"lora_rank": 2, "lora_dropout": 0.2, "holdout": 0.3, "num_epochs": 9},
    "preference": {"holdout": 0.3, "num_epochs": 9, "optimizer": "rmsprop", "warmup_steps": 3},
}
"""Streaming, LoRA with dropout, a reference computed beforehand; all with accumulation and evaluation."""
SHARED = {
    "max_steps": 8,
    "batch_size": 5,
    "learning_rate": 1e-2,
    "tokens_per_batch": 24,
    "eval_every": 2,
    "save_every": 2,
    "num_samples": 2,
    "sample_tokens": 4,
}

IN_A_STEP = ["torch", "Tensor.backward"]
IN_AN_UPDATE = ["trueup.trainers.stepping", "Stepper.step"]
IN_EVALUATION = ["trueup.runs.progress", "RunProgress.aside"]
IN_A_RECORD = ["trueup.runs.folder", "RunFolder.log"]
IN_A_SYNC = ["os", "fsync"]
AT_A_RENAME = ["pathlib", "Path.rename"]
IN_A_STATE = ["torch", "save"]
WHILE_PRUNING = ["trueup.runs.checkpoint", "prune"]
POINTS = [IN_A_STEP, IN_AN_UPDATE, IN_EVALUATION, IN_A_RECORD, IN_A_SYNC, AT_A_RENAME, IN_A_STATE, WHILE_PRUNING]
"""Where a life can end itself: what a kill from outside hits seldom lasts microseconds."""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[int]]]:
    """Runs a plan (see ``train.py``) and returns how each life ended."""
    environment = os.environ | {
        "TRUEUP_CACHE": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("train.py")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(loop: str, settings: dict[str, Any], kills: list[Any]) -> list[int]:
            print(json.dumps({"loop": loop, "settings": settings, "kills": kills}), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


def left(folder: Path) -> dict[str, Any]:
    """Everything that a run computed."""
    newest = latest_checkpoint(folder)
    assert newest is not None
    metrics = [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_lines(folder / "metrics.jsonl")
    ]
    samples = folder / "samples.jsonl"
    return {
        "metrics": metrics,
        "samples": samples.read_text() if samples.exists() else None,
        "checkpoints": sorted(path.name for path in newest.parent.iterdir()),
        "weights": {
            name: (tensor.dtype, tensor.tolist())
            for name, tensor in load_file(newest / "model" / "model.safetensors").items()
        },
        "files": sorted(path.name for path in folder.iterdir()),
    }


def check(loop: str, kills: list[Any], ends: Callable[..., list[int]], settings: dict[str, Any], tmp_path: Path) -> int:
    """The number of lives that were killed, after both runs were compared."""
    settings = SHARED | RUNS[loop] | settings
    assert ends(loop, settings | {"output": str(tmp_path / "whole")}, []) == [0]
    found = ends(loop, settings | {"output": str(tmp_path / "killed")}, kills)
    whole, killed = left(tmp_path / "whole"), left(tmp_path / "killed")
    assert whole["metrics"][-1]["step"] == settings["max_steps"]
    for name in whole:
        assert killed[name] == whole[name], name
    return sum(end != 0 for end in found)


@pytest.fixture
def data(tiny_model: Path, pairs_file: Path) -> dict[str, Any]:
    return {"model": str(tiny_model), "data": [str(pairs_file)]}


@pytest.mark.parametrize("loop", RUNS)
def test_killed_in_a_step_in_evaluation_and_in_a_checkpoint(loop: str, ends, data, pairs_file, tmp_path):
    if loop == "sft":
        data |= {"eval_data": [str(pairs_file)]}
    kills = [[*IN_A_STEP, 11], [*IN_EVALUATION, 2], [*IN_A_SYNC, 12]]
    assert check(loop, kills, ends, data, tmp_path) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loop", RUNS)
def test_killed_at_ten_random_moments(loop: str, seed: int, ends, data, pairs_file, tmp_path):
    """Half of the kills come from outside at any time, half at a chosen point. Every life gets a little further."""
    random = np.random.default_rng([seed, len(loop)])
    data |= {"eval_data": [str(pairs_file)]} if loop == "sft" else {}
    data |= {"max_steps": 36}
    kills: list[Any] = [float(random.uniform(0.02, 0.25)) for _ in range(5)]
    kills += [[*POINTS[random.integers(len(POINTS))], int(random.integers(1, 4))] for _ in range(5)]
    assert check(loop, [kills[index] for index in random.permutation(10)], ends, data, tmp_path) == 10
