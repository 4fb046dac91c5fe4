"""The records of ``metrics.jsonl`` sent to trackers as well: TensorBoard, Weights & Biases, trackio, MLflow.

A tracker is a convenience. One that can't be opened or fails later (no login, no network, a full disk) is switched off
with one warning, and the run goes on. What they are called in their own world is kept in ``trackers.json`` in the run
folder, so that a resumed run goes on with the same record there.

Where they write and who one is to them is set as each documents it (``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI``,
``TRACKIO_DIR`` …); TensorBoard writes into ``tensorboard`` in the run folder.
"""

from __future__ import annotations

import json
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from trueup.errors import SettingsError, require_extra
from trueup.runs.files import write_atomic
from trueup.runs.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run when it is opened."""

    folder: Path
    project: str
    settings: Mapping[str, Any]
    step: int
    """The step that the run goes on from; 0 at its start."""
    id: str | None
    """What the tracker called this run when it was opened first."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name


class Tracker(Protocol):
    """Where metrics go. Every method may raise."""

    id: str

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in the run folder; what an earlier part of the run wrote after ``step`` is hidden."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = "tensorboard"
        self._writer = SummaryWriter(str(run.folder / self.id), purge_step=run.step + 1 if run.step else 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of its own beside any that the process has open; offline runs are sent later with ``wandb sync``."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id or secrets.token_hex(4),
            resume="allow",
            reinit="create_new",
            dir=str(run.folder),
            config=dict(run.settings),
        )
        self.id = self._run.id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """trackio knows a run by its name, which therefore carries a random ending."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.id = run.id or f"{run.name}-{secrets.token_hex(4)}"
        self._run = trackio.init(
            project=run.project,
            name=self.id,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


class MLflow:
    """Through MLflow's client, so that the process's own active run is left alone."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if run.id is not None:
            self.id = run.id
            self._client.update_run(self.id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        self.id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        params = [Param(name, str(value)) for name, value in run.settings.items()]
        for start in range(0, len(params), 100):  # the most that one call takes
            self._client.log_batch(self.id, params=params[start : start + 100])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
}
"""By the name of the package, which is also that of the extra that brings it."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise ``MissingExtraError`` for a tracker whose package isn't installed, ``SettingsError`` for an unknown one."""
    for name in names:
        if name not in TRACKERS:
            raise SettingsError(f"there is no tracker {name!r}", where="--tracker", way_out=", ".join(TRACKERS))
        require_extra(name, name)


@contextmanager
def open_trackers(
    names: Sequence[str], folder: RunFolder, *, project: str, settings: Mapping[str, Any], step: int
) -> Iterator[Callable[[Mapping[str, Any], int], None]]:
    """What sends a record to all trackers: ``log(metrics, step)``. They are told at the end how the run ended.

    ``settings``: plain values, for the tracker's record. Only numbers are sent. Nothing that a tracker does raises.
    """
    record = folder.path / "trackers.json"
    known = _read(record)
    opened: dict[str, Tracker] = {}

    def attempt(name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:
            opened.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"{name} is switched off, the run goes on without it: {reason}", stacklevel=3)

    def log(metrics: Mapping[str, Any], step: int) -> None:
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}
        for name, tracker in list(opened.items()):
            attempt(name, lambda tracker=tracker: tracker.log(numbers, step))

    for name in names:
        run = TrackedRun(folder=folder.path, project=project, settings=settings, step=step, id=known.get(name))
        if tracker := attempt(name, lambda name=name, run=run: TRACKERS[name](run)):
            opened[name] = tracker
    if opened:
        ids = known | {name: tracker.id for name, tracker in opened.items()}
        attempt("trackers.json", lambda: write_atomic(record, json.dumps(ids, indent=2).encode() + b"\n"))
    failed = True
    try:
        yield log
        failed = False
    finally:
        for name, tracker in list(opened.items()):
            attempt(name, lambda tracker=tracker: tracker.close(failed=failed))


def _read(record: Path) -> dict[str, str]:
    """Ids of an earlier part of the run; none where the file is missing or damaged, and the tracker begins anew."""
    try:
        return dict(json.loads(record.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}
