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

TIMES = {"step_seconds", "tokens_per_second", "sample_seconds", "score_seconds", "prepare_seconds"}
RUNS: dict[str, dict[str, Any]] = {
    "sft": {"streaming": True},
    "reward": {"lora_rank": 2, "lora_dropout": 0.2, "holdout": 0.3, "num_epochs": 9},
    "preference": {"holdout": 0.3, "num_epochs": 9, "optimizer": "rmsprop", "warmup_steps": 3},
}
"""Streaming, LoRA with dropout, a reference computed beforehand; all with accumulation and evaluation."""
ONLINE: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coef": 0.1, "entropy_coef": 0.01, "reference_every": 2},
    "ppo": {"kl_target": 0.5, "critic_warmup": 1, "truncated_completions": "bootstrapped", "group_size": 2},
    "dapo": {"filter_groups": True, "max_draws": 3, "reward": ("exact",)},
    "reinforce": {"lora_rank": 2, "kl_target": 0.5, "target_kl": 0.02},
    "gspo": {"rollout_dtype": "bfloat16", "importance": "truncated"},
    "rft": {"success_score": -0.6},
}
"""By recipe: a reference that moves; a critic, KL in the reward with an adaptive leash; groups that are drawn again;
LoRA, rollouts that end early; a copy in bfloat16 to sample from; samples from the start, evaluations of the policy."""
IN_AND_BETWEEN_ROLLOUTS = {
    "batch_size": 4,
    "group_size": 3,
    "num_mini_batches": 2,
    "inner_epochs": 2,
    "max_new_tokens": 4,
    "learning_rate": 1e-2,
    "tokens_per_batch": 32,
    "max_batch_tokens": 64,
    "dtype": "float32",
    "holdout": 0.3,
    "max_steps": 12,
    "eval_every": 2,
    "save_every": 3,
    "num_samples": 2,
}
"""A rollout has four steps: checkpoints and evaluations fall in the middle of one, and at its end, and some evaluations
in the middle of one that was gone on with."""
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
IN_ONLINE_EVALUATION = ["trueup.trainers.evaluation", "pass_at_k_metrics"]
IN_SAMPLING = ["trueup.rollout.torch_engine", "TorchEngine._sample"]
IN_SCORING = ["trueup.rewards.rewards", "checked"]
IN_PREPARATION = ["trueup.trainers.rollouts", "put_rows"]
BETWEEN_ROLLOUTS = ["trueup.trainers.policy", "end_rollout"]
POINTS = [IN_A_STEP, IN_AN_UPDATE, IN_EVALUATION, IN_A_RECORD, IN_A_SYNC, AT_A_RENAME, IN_A_STATE, WHILE_PRUNING]
"""Where a life can end itself: what a kill from outside hits seldom lasts microseconds."""
ONLINE_POINTS = [IN_ONLINE_EVALUATION, IN_SAMPLING, IN_SCORING, IN_PREPARATION, BETWEEN_ROLLOUTS]
ONLINE_POINTS += [point for point in POINTS if point is not IN_EVALUATION]


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
            f"{path.parent.name}/{name}": (tensor.dtype, tensor.tolist())
            for path in sorted(newest.glob("*/model.safetensors"))
            for name, tensor in load_file(path).items()
        },
        "files": sorted(path.name for path in folder.iterdir()),
    }


def check(loop: str, kills: list[Any], ends: Callable[..., list[int]], settings: dict[str, Any], tmp_path: Path) -> int:
    """The number of lives that were killed, after both runs were compared."""
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


@pytest.fixture
def questions(tiny_model: Path, questions_file: Path) -> dict[str, Any]:
    reward = (f"{questions_file.with_name('closeness.py')}:closeness", "length:target=3")
    return {"model": str(tiny_model), "data": [str(questions_file)], "reward": reward}


@pytest.mark.parametrize("loop", RUNS)
def test_killed_in_a_step_in_evaluation_and_in_a_checkpoint(loop: str, ends, data, pairs_file, tmp_path):
    if loop == "sft":
        data |= {"eval_data": [str(pairs_file)]}
    kills = [[*IN_A_STEP, 11], [*IN_EVALUATION, 2], [*IN_A_SYNC, 12]]
    assert check(loop, kills, ends, SHARED | RUNS[loop] | data, tmp_path) == 3


def test_killed_in_sampling_scoring_learning_and_evaluation(ends, questions, tmp_path):
    """A kill of each kind: in the second rollout three times, gone on with from step 3; in the third, from step 9."""
    settings = IN_AND_BETWEEN_ROLLOUTS | questions | ONLINE["ppo"] | ONLINE["gspo"]
    settings |= {"recipe": "ppo", "learning_rate": 0.05, "lr_schedule": "constant"}  # every step shows in samples
    kills = [[*IN_SCORING, 5], [*IN_SAMPLING, 25], [*IN_AN_UPDATE, 5], [*IN_ONLINE_EVALUATION, 4], [*IN_A_SYNC, 12]]
    assert check("rl", kills, ends, settings, tmp_path) == 5


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
    kills = [kills[index] for index in random.permutation(10)]
    assert check(loop, kills, ends, SHARED | RUNS[loop] | data, tmp_path) == 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("recipe", ONLINE)
def test_online_killed_at_random_moments(recipe: str, seed: int, ends, questions, tmp_path):
    """More moments than ten: a life may run over several steps before its own, and the run be over before the last."""
    random = np.random.default_rng([seed, len(recipe)])
    settings = IN_AND_BETWEEN_ROLLOUTS | questions | ONLINE[recipe] | {"recipe": recipe, "max_steps": 128}
    points = [point for point in ONLINE_POINTS if (recipe, point) != ("rft", IN_PREPARATION)]  # rft prepares nothing
    kills: list[Any] = [float(random.uniform(0.005, 0.04)) for _ in range(6)]
    kills += [[*points[random.integers(len(points))], int(random.integers(1, 3))] for _ in range(8)]
    assert check("rl", [kills[index] for index in random.permutation(14)], ends, settings, tmp_path) >= 10
