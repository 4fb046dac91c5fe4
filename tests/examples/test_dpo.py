"""DPO by hand, by library and by us: the same losses over the first steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from trueup import preference
from trueup.models.scratch import make_model
from trueup.runs.folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


class Task(NamedTuple):
    model: str
    data: str
    learning_rate: float


@pytest.fixture(scope="module", params=["characters", "sentencepiece"])
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A model and a file of pairs. The second one's tokenizer puts a space in front of a text that stands alone.

    Where a token spans the end of a prompt (one that ends with a space, say) each of the three cuts otherwise.
    """
    folder = tmp_path_factory.mktemp("task")
    if request.param == "characters":
        model = make_model(
            folder / "tiny", characters="0123456789+=", hidden_size=16, num_layers=2, num_heads=2, seed=3
        )
        rows = [
            {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 7)}
            for a in range(3)
            for b in range(4)
        ]
    else:
        model = request.getfixturevalue("shared_data") / "stories260K"
        rows = [
            {"prompt": f"Once there was {who}. What did {who} {verb}?", "chosen": "They saw a ball.", "rejected": "No."}
            for who in ("Lily", "Tim", "a cat", "the old man")
            for verb in ("see", "eat", "find")
        ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task(str(model), str(file), 1e-2 if request.param == "characters" else 1e-4)


@pytest.fixture(scope="module")
def ours(task: Task, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """As the docstring of the example has it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings: dict[str, Any] = {
        "batch_size": 4,
        "max_steps": STEPS,
        "lr_schedule": "constant",
        "learning_rate": task.learning_rate,
    }
    settings |= {"streaming": True, "dtype": "float32", "num_samples": 0, "quiet": True}
    preference(model=task.model, data=task.data, output=str(folder), **settings)
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def run(python: str, script: str, task: Task, *flags: str) -> list[float]:
    """The losses that an example prints."""
    command = [python, str(ROOT / "examples" / script), "--model", task.model, "--data", task.data]
    command += ["--steps", str(STEPS), "--learning-rate", str(task.learning_rate), *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"step \d+  loss ([\d.]+)", done.stdout)]


def test_by_hand(task: Task, ours: list[float], tmp_path: Path):
    losses = run(sys.executable, "dpo_by_hand.py", task, "--output", str(tmp_path / "model"))
    assert len(ours) == STEPS
    assert ours[-1] < ours[0] - 0.01  # there was something to learn
    assert losses == pytest.approx(ours, abs=2e-6)
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_by_hand_is_short_and_needs_no_library_of_training():
    source = (ROOT / "examples" / "dpo_by_hand.py").read_text()
    assert len(source.splitlines()) <= 120
    assert "trueup" not in re.sub(r'""".*?"""', "", source, count=1, flags=re.DOTALL)
    assert set(re.findall(r"^(?:from|import) ([a-z]+)", source, re.MULTILINE)) <= {
        *("argparse", "copy", "itertools", "json", "collections", "pathlib", "typing", "torch", "transformers")
    }


@pytest.mark.slow
def test_with_trl(task: Task, ours: list[float], tmp_path: Path):
    """TRL has an environment of its own: the one that the benchmarks make, or the one that a variable names."""
    python = os.environ.get("TRUEUP_BENCH_PEER_PYTHON", str(ROOT / ".venv-trl" / "bin" / "python"))
    if not Path(python).exists():
        pytest.skip("no environment with TRL: make bench makes one")
    losses = run(python, "dpo_with_trl.py", task, "--output", str(tmp_path / "model"))
    assert losses == pytest.approx(ours, abs=2e-6)
