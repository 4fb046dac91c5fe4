"""The reference: known in advance, kept on disk, asked for anew when anything changes."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trueup import preference
from trueup.errors import CheckpointError
from trueup.models.adapters import add_lora
from trueup.models.load import load_model
from trueup.models.scorer import Scorer
from trueup.records import Completion, CompletionGroup
from trueup.runs.folder import read_metrics
from trueup.trainers.reference import fingerprint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def train(model: str, data: Any, output: Path, **settings: Any) -> list[dict[str, Any]]:
    defaults = {"batch_size": 8, "learning_rate": 1e-2, "num_samples": 0, "num_epochs": 2, "eval_data": data[:5]}
    preference(model=model, data=data, output=str(output), **(defaults | {"quiet": True} | settings))
    times = {"step_seconds", "tokens_per_second"}
    lines = read_metrics(output / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_known_in_advance_is_what_a_live_reference_says(
    lora_rank: int, cache: Path, tiny_model: str, pairs: list, tmp_path: Path
):
    settings = {"lora_rank": lora_rank, "dtype": "float32"}
    live = train(tiny_model, pairs, tmp_path / "live", cache_reference=False, **settings)
    assert not cache.exists()
    known = train(tiny_model, pairs, tmp_path / "known", **settings)
    for ours, theirs in zip(known, live, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_second_run_finds_it_on_disk(
    cache: Path, tiny_model: str, pairs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = train(tiny_model, pairs, tmp_path / "first")
    (file,) = cache.iterdir()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the reference is computed again")

    with monkeypatch.context() as patch:
        patch.setattr("trueup.trainers.reference.computed_logprobs", fail)
        assert train(tiny_model, pairs, tmp_path / "second") == first
        assert train(tiny_model, pairs, tmp_path / "other", beta=0.5) != first
        with pytest.raises(AssertionError, match="again"):
            train(tiny_model, pairs[:-1], tmp_path / "fewer")
    for damage in (b"", file.read_bytes()[:-3], b"nonsense" * 100):
        file.write_bytes(damage)
        name = f"damaged-{len(damage)}"
        assert train(tiny_model, pairs, tmp_path / name) == first
    assert len(list(cache.iterdir())) == 1


def test_the_file_tells_what_it_is_of_and_when_it_was_used(cache: Path, tiny_model: str, pairs: list, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    settings = {"model": tiny_model, "data": str(rows), "quiet": True, "max_steps": 1, "num_samples": 0}
    preference(output=str(tmp_path / "first"), **settings)
    (file,) = cache.iterdir()
    with safe_open(file, framework="numpy") as stored:
        assert stored.metadata() == {"model": tiny_model, "data": str(rows)}
    os.utime(file, (0, 0))
    preference(output=str(tmp_path / "second"), **settings)
    assert time.time() - file.stat().st_mtime < 3600


def test_a_cache_that_can_not_be_written_stops_nothing(
    tiny_model: str, pairs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "file"))
    train(tiny_model, pairs, tmp_path / "run", quiet=False)
    assert "not kept on disk" in capsys.readouterr().out


def test_a_resumed_run_has_the_reference_of_its_start(cache: Path, tiny_model: str, pairs: list, tmp_path: Path):
    settings = {"save_every": 1, "keep_checkpoints": 10}
    whole = train(tiny_model, pairs, tmp_path / "run", **settings)
    for path in cache.iterdir():
        path.unlink()
    last = tmp_path / "run" / "checkpoints" / f"step-{whole[-1]['step']:06d}"
    for path in sorted(last.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    last.rmdir()
    assert train(tiny_model, pairs, tmp_path / "run", resume="yes", **settings) == whole


def test_another_reference_is_another_model(cache: Path, tiny_model: str, pairs: list, tmp_path: Path):
    tuned = train(tiny_model, pairs, tmp_path / "tuned")
    assert tuned
    checkpoint = next((tmp_path / "tuned" / "checkpoints").iterdir()) / "model"
    lines = train(tiny_model, pairs, tmp_path / "run", reference=str(checkpoint))
    assert abs(lines[0]["eval_rewards/margins"]) > 1e-3
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("cache_reference", [True, False])
def test_a_resumed_run_wants_the_reference_it_began_with(
    cache_reference: bool, cache: Path, tiny_model: str, pairs: list, tmp_path: Path
):
    reference = Path(shutil.copytree(tiny_model, tmp_path / "reference"))
    settings = {"reference": str(reference), "cache_reference": cache_reference, "save_every": 1}
    whole = train(tiny_model, pairs, tmp_path / "run", **settings)
    assert train(tiny_model, pairs, tmp_path / "run", resume="yes", **settings) == whole
    weights = load_file(reference / "model.safetensors")
    save_file(
        {name: 1.01 * tensor for name, tensor in weights.items()}, reference / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="started with: reference\n  → give the reference model as it was"):
        train(tiny_model, pairs, tmp_path / "run", resume="yes", **settings)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == len(whole)


def test_the_fingerprint_sees_weights_config_and_tokens(tiny_model: str):
    tokens = np.array([3, 4], dtype=np.int64)
    groups = [CompletionGroup(prompt=tokens, completions=(Completion(tokens=tokens),))]
    other = [CompletionGroup(prompt=tokens, completions=(Completion(tokens=tokens[:1]),))]
    loaded: Any = load_model(tiny_model).model
    scorer = Scorer(loaded)
    first = fingerprint(scorer.model, groups)
    assert fingerprint(scorer.model, other) != first
    add_lora(loaded, rank=2)
    assert fingerprint(loaded, groups) == first, "an adapter that is switched off is no part of the reference"
    loaded.config.rms_norm_eps *= 2
    assert fingerprint(loaded, groups) != first
    loaded.config.rms_norm_eps /= 2
    with torch.no_grad():
        next(loaded.parameters())[0, 0] += 1e-3
    assert fingerprint(loaded, groups) != first
