"""Trackers get the records of ``metrics.jsonl``, and never harm a run. With fakes, and with what is installed."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from trueup.errors import MissingExtraError, SettingsError
from trueup.runs.folder import RunFolder
from trueup.runs.trackers import TRACKERS, TrackedRun, open_trackers, require_trackers

SETTINGS = {"kind": "sft", "learning_rate": 1e-3, "data": ["a.jsonl"], "limit": None}


@dataclass(frozen=True)
class Settings:
    """Of no importance here."""

    seed: int = 0


class Fake:
    """Writes down what it is given; fails at the call named in ``fails``."""

    fails = ""
    made: ClassVar[list[Fake]] = []

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.id, self.records, self.closed = run, run.id or f"id-{len(self.made)}", [], None
        self.made.append(self)
        if self.fails == "open":
            raise ConnectionError("no network\nand more")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.fails == "log":
            raise OSError("disk full")
        self.records.append((step, dict(metrics)))

    def close(self, *, failed: bool) -> None:
        self.closed = failed
        if self.fails == "close":
            raise RuntimeError


@pytest.fixture
def fakes(monkeypatch) -> list[Fake]:
    made: list[Fake] = []
    for name in ("good", "bad"):
        monkeypatch.setitem(TRACKERS, name, type(name, (Fake,), {"made": made}))
    return made


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", Settings())


def opened(folder: RunFolder, *names: str, step: int = 0):
    return open_trackers(names, folder, project="sums", settings=SETTINGS, step=step)


def test_numbers_arrive_with_their_step(folder, fakes):
    with opened(folder, "good") as log:
        log({"loss": 0.5, "num_tokens": 12, "flag": True, "note": "x", "none": None}, 1)
        log({"loss": math.nan}, 2)
    (fake,) = fakes
    assert fake.records[0] == (1, {"loss": 0.5, "num_tokens": 12.0, "flag": 1.0})
    assert math.isnan(fake.records[1][1]["loss"])
    assert fake.closed is False
    assert (fake.run.name, fake.run.project, fake.run.settings, fake.run.step) == ("run", "sums", SETTINGS, 0)


def test_a_resumed_run_goes_on_with_the_same_record(folder, fakes):
    with opened(folder, "good"):
        pass
    with opened(folder, "good", step=7):
        pass
    assert [(fake.run.id, fake.id, fake.run.step) for fake in fakes] == [(None, "id-0", 0), ("id-0", "id-0", 7)]
    assert json.loads((folder.path / "trackers.json").read_text()) == {"good": "id-0"}


def test_damaged_ids_are_made_anew(folder, fakes):
    (folder.path / "trackers.json").write_text("[1")
    with opened(folder, "good"):
        pass
    assert fakes[0].run.id is None


def test_a_run_that_fails_is_told_so_and_its_error_passes(folder, fakes):
    with pytest.raises(ZeroDivisionError), opened(folder, "good"):
        raise ZeroDivisionError
    assert fakes[0].closed is True


@pytest.mark.parametrize("fails", ["open", "log", "close"])
def test_one_that_fails_is_switched_off_with_one_warning(folder, fakes, monkeypatch, fails):
    monkeypatch.setattr(TRACKERS["bad"], "fails", fails)

    def run() -> None:
        with opened(folder, "bad", "good") as log:
            for step in range(3):
                log({"loss": 1.0}, step)

    with pytest.warns(UserWarning, match="bad is switched off, the run goes on without it") as warned:
        run()
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    good = fakes[-1]
    assert [step for step, _ in good.records] == [0, 1, 2]
    assert good.closed is False


def test_without_trackers_nothing_is_written(folder):
    with opened(folder) as log:
        log({"loss": 1.0}, 1)
    assert not (folder.path / "trackers.json").exists()


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"trueup\[wandb\]"):
        require_trackers(["wandb"])
    with pytest.raises(SettingsError, match="no tracker 'wandbb'"):
        require_trackers(["wandbb"])


def test_wandb_is_asked_for_the_same_run(folder, monkeypatch):
    """What is asked of the package, without it."""
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> Any:
        asked.append(options)
        return types.SimpleNamespace(id=options["id"], log=lambda *a, **k: None, finish=lambda **k: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (0, 4):
        with opened(folder, "wandb", step=step) as log:
            log({"loss": 1.0}, step)
    assert asked[0]["id"] == asked[1]["id"]
    assert {options["resume"] for options in asked} == {"allow"}
    assert asked[0]["config"] == SETTINGS


# ------------------------------------------------------------------------------------------- the packages themselves


def test_tensorboard_hides_what_the_killed_run_wrote_after_its_checkpoint(folder):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, value in ((0, 1.0), (1, 2.0)):
        with opened(folder, "tensorboard", step=step) as log:
            for at in range(step + 1, 4):
                log({"loss": value}, at)
    found = events.EventAccumulator(str(folder.path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_wandb_offline_writes_a_run_with_one_id(folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with opened(folder, "wandb") as log:
        log({"loss": 0.5, "bad": math.nan}, 1)
    run_id = json.loads((folder.path / "trackers.json").read_text())["wandb"]
    with opened(folder, "wandb", step=1) as log:
        log({"loss": 0.25}, 2)
    assert len(list(folder.path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))) >= 1


def test_trackio_goes_on_in_the_same_run(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is first imported
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    for step in (0, 1):
        with opened(folder, "trackio", step=step) as log:
            log({"loss": 0.5, "bad": math.inf}, step + 1)
    run_id = json.loads((folder.path / "trackers.json").read_text())["trackio"]
    found = storage.get_logs("sums", run_id)
    assert [(record["step"], record["loss"]) for record in found] == [(1, 0.5), (2, 0.5)]
    trackio.delete_project("sums", force=True)


def test_mlflow_goes_on_in_the_same_run(folder, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    try:
        for step in (0, 1):
            with opened(folder, "mlflow", step=step) as log:
                log({"rewards/accuracies": 0.5, "bad": math.nan}, step + 1)
        client = mlflow.MlflowClient()
        run_id = json.loads((folder.path / "trackers.json").read_text())["mlflow"]
        run = client.get_run(run_id)
        history = client.get_metric_history(run_id, "rewards/accuracies")
    finally:
        mlflow.set_tracking_uri(before)
    assert sorted(metric.step for metric in history) == [1, 2]
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.001"
    assert Path(folder.path / "trackers.json").exists()
