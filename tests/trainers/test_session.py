"""What surrounds a loop: trackers, fingerprints, memory, the lock."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trueup import sft
from trueup.errors import CheckpointError, MissingExtraError, OutOfMemoryError
from trueup.models.load import load_model
from trueup.records import Completion, CompletionGroup
from trueup.runs.folder import read_lines
from trueup.runs.trackers import TRACKERS, TrackedRun
from trueup.trainers.fingerprint import (
    check_unchanged,
    groups_fingerprint,
    stream_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from trueup.trainers.memory import memory_errors
from trueup.trainers.settings import SFTSettings

QUICK: dict[str, Any] = {"quiet": True, "batch_size": 8, "num_samples": 0, "save_every": 1, "keep_checkpoints": 9}

# ------------------------------------------------------------------------------------------------------- trackers


class Fake:
    """Keeps what it is sent, over all runs."""

    sent: list[tuple[int, dict[str, float]]]
    runs: list[TrackedRun]

    def __init__(self, run: TrackedRun) -> None:
        self.id = "the-id"
        self.runs.append(run)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.sent.append((step, dict(metrics)))

    def close(self, *, failed: bool) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    kind = type("OneTest", (Fake,), {"sent": [], "runs": []})
    monkeypatch.setitem(TRACKERS, "wandb", kind)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    return kind


def test_a_tracker_gets_the_records_of_metrics_jsonl(fake: type[Fake], tiny_model: str, pairs: list, output: str):
    result = sft(model=tiny_model, data=pairs, output=output, holdout=0.3, tracker=("wandb",), **QUICK)
    assert [{"step": step, **metrics} for step, metrics in fake.sent] == read_lines(result.folder / "metrics.jsonl")
    (run,) = fake.runs
    assert (run.project, run.name, run.step, run.settings["kind"]) == ("trueup", "run", 0, "sft")
    assert json.dumps(run.settings)


def test_a_tracker_may_come_late(fake: type[Fake], tiny_model: str, pairs: list, output: str):
    """Which trackers a run has is no matter of what it computes."""
    sft(model=tiny_model, data=pairs, output=output, **QUICK)
    sft(model=tiny_model, data=pairs, output=output, tracker=("wandb",), resume="yes", **QUICK)
    assert [(run.step, run.id) for run in fake.runs] == [(3, None)]
    assert fake.sent == []


def test_a_missing_tracker_stops_before_anything_is_done(monkeypatch, output: str):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match=r"trueup\[trackio\]"):
        sft(model="nowhere", data="nothing", output=output, tracker=("trackio",))
    assert not Path(output).exists()


# --------------------------------------------------------------------------------------------------- fingerprints


def group(*, prompt: int = 4, answer: int = 5, **changes: Any) -> CompletionGroup:
    completion = Completion(tokens=np.array([answer, 2]))
    return CompletionGroup(prompt=np.array([prompt]), completions=(completion, completion), **changes)


def test_groups_are_known_by_what_is_in_them():
    masked = Completion(tokens=np.array([5, 2]), mask=np.array([True, False]))
    different = [
        [group()],
        [group(), group()],
        [group(prompt=5)],
        [group(answer=6)],
        [group(margin=1.0)],
        [dataclasses.replace(group(), completions=(masked, masked))],
        [dataclasses.replace(group(), completions=group().completions[:1])],
        [group(prompt=5), group()],
        [group(), group(prompt=5)],
    ]
    assert len({groups_fingerprint(groups) for groups in different}) == len(different)
    assert groups_fingerprint([group(where="a.jsonl:1")]) == groups_fingerprint([group(where="b.jsonl:7")])


def test_a_stream_is_known_by_its_files(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("one")
    (tmp_path / "b.jsonl").write_text("two")
    both = (str(tmp_path / "*.jsonl"),)
    before = stream_fingerprint(both, [])
    assert before == stream_fingerprint([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], [])
    assert before != stream_fingerprint(both, [group()])
    assert before != stream_fingerprint(tmp_path / "a.jsonl", [])
    (tmp_path / "b.jsonl").write_text("twp")
    assert before != stream_fingerprint(both, [])
    assert stream_fingerprint("hf:someone/something", []) == stream_fingerprint([{"prompt": "x"}], [])


def test_every_byte_of_a_long_file_counts_and_nothing_else(tmp_path: Path):
    path, content = tmp_path / "long.jsonl", bytearray(3 << 20)
    path.write_bytes(content)
    found = {stream_fingerprint(path, [])}
    for changed in (0, len(content) // 2, len(content) - 1):
        content[changed] ^= 1
        path.write_bytes(content)
        found.add(stream_fingerprint(path, []))
    assert len(found) == 4
    os.utime(path, (0, 0))
    assert stream_fingerprint(path, []) in found
    # two files are not one that holds both
    (tmp_path / "a").write_bytes(content[:9])
    (tmp_path / "b").write_bytes(content[9:])
    assert stream_fingerprint([tmp_path / "a", tmp_path / "b"], []) not in found


def test_weights_are_known_in_any_precision(tiny_model: str):
    model = load_model(tiny_model, dtype="float32").model
    before = weights_fingerprint(model)
    assert weights_fingerprint(load_model(tiny_model, dtype="bfloat16").model) == before
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.01)
    assert weights_fingerprint(model) != before
    assert weights_fingerprint(nn.Linear(2, 3)) != weights_fingerprint(nn.Linear(3, 2))
    large = nn.Linear(200, 200)  # of which only some numbers are looked at
    before = weights_fingerprint(large)
    assert weights_fingerprint(large.bfloat16()) == before


def test_a_tokenizer_is_known_by_vocabulary_and_template(tiny_model: str):
    tokenizer: Any = load_model(tiny_model).tokenizer
    seen = {tokenizer_fingerprint(tokenizer)}
    tokenizer.chat_template = "{{ messages }}"
    seen.add(tokenizer_fingerprint(tokenizer))
    tokenizer.add_tokens(["word"])
    seen.add(tokenizer_fingerprint(tokenizer))
    assert len(seen) == 3


def test_what_changed_is_named():
    then = {"training data": "a", "held-out data": "b", "tokenizer": "c", "starting weights": "d"}
    check_unchanged(then, then, "run")
    check_unchanged({}, then, "run")  # a checkpoint of an earlier version
    with pytest.raises(CheckpointError, match=r"run: .*started with: held-out data, starting weights\n"):
        check_unchanged(then, then | {"held-out data": "x", "starting weights": "x"}, "run")
    with pytest.raises(CheckpointError, match="started with: tokenizer\n"):
        check_unchanged(then, then | {"training data": "x", "tokenizer": "x"}, "run")


def test_a_model_object_that_was_trained_is_not_taken_for_the_one_before(tiny_model: str, pairs: list, output: str):
    loaded = load_model(tiny_model)
    settings = {"tokenizer": loaded.tokenizer, "data": pairs, "output": output, "learning_rate": 1e-2, **QUICK}
    sft(model=loaded.model, **settings)
    with pytest.raises(CheckpointError, match=r"starting weights\n  → give the model as it was before training"):
        sft(model=loaded.model, resume="yes", **settings)
    sft(model=load_model(tiny_model).model, resume="yes", **settings)


# --------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("groups", "settings", "parts"),
    [
        ([group()] * 3, {}, ["with 15 tokens in one pass\n", "--tokens-per-batch 7 or --gradient-checkpointing"]),
        ([group()], {}, ["5 tokens in one pass, all of one row", "--max-length 2 or --lora-rank 16"]),
        ([], {"tokens_per_batch": 512}, ["out of memory\n", "--tokens-per-batch 256"]),
        ([], {"gradient_checkpointing": True, "lora_rank": 4}, ["and --tokens-per-batch 2048, which change no result"]),
    ],
)
def test_what_to_lower_and_to_what(groups: list, settings: dict[str, Any], parts: list[str]):
    with pytest.raises(OutOfMemoryError) as raised, memory_errors(SFTSettings(**settings), groups):
        torch.empty(1 << 60)
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes"), memory_errors(SFTSettings()):
        raise RuntimeError("shapes differ")


# ----------------------------------------------------------------------------------------------------------- lock


def test_a_run_that_fails_leaves_its_folder_unlocked(tiny_model: str, pairs: list, output: str):
    with pytest.raises(ZeroDivisionError) as raised:
        sft(model=tiny_model, data=(1 / 0 for _ in pairs), output=output, quiet=True)
    assert raised.value is not None  # its traceback still holds the session
    assert not (Path(output) / ".lock").exists()
