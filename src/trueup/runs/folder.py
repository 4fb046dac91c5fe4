"""The run folder: settings, environment, metrics and samples of one run.

::

    runs/NAME/
      config.yaml         every setting; ``trueup COMMAND --config config.yaml`` repeats the run
      environment.json    versions, machine, threads, git revision, command line
      metrics.jsonl       one JSON object a line: ``step`` and flat metric names
      samples.jsonl       one JSON object a line: ``step`` and what the model wrote
      calibration.jsonl   one JSON object a line: ``step`` and the tables behind a reward model's evaluation
      bad_batches.jsonl   one JSON object a line: ``step`` and a row of a batch that was skipped; often absent
      checkpoints/        see ``checkpoint.py``
      .lock               while a process writes here, see ``lock.py``
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from trueup.errors import CheckpointError, DataError, SettingsError
from trueup.runs.files import is_leftover, sync_folder, write_atomic, write_errors
from trueup.runs.lock import LOCK_NAME, FolderLock
from trueup.runs.settings import to_yaml, values_from_yaml

_PACKAGES = ("trueup", "torch", "transformers", "numpy", "safetensors", "peft", "datasets", "tokenizers")
_FIRST_FILES = {"config.yaml", "environment.json"}
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's folder. Make one with ``RunFolder.create``."""

    path: Path
    lock: FolderLock | None = field(default=None, compare=False, repr=False)
    """Keeps other processes out, until ``close`` or the last reference is gone."""

    @classmethod
    def create(
        cls, path: str | Path, settings: Any, *, resume: bool = False, may_change: Iterable[str] = ()
    ) -> RunFolder:
        """Make the folder and write ``config.yaml`` and ``environment.json``.

        With ``resume`` the folder may hold a run already: its ``config.yaml`` is then compared with ``settings`` (the
        fields in ``may_change`` apart) and rewritten, and the new environment is added to ``environment.json`` under
        ``resumed``. Resuming a folder that holds nothing is starting it, so that one command serves first start and
        restart. A run that stopped before its first step leaves its folder free.

        From here on no other process can open the folder, until ``close``.

        Raises ``SettingsError`` for a folder that isn't empty without ``resume``, or that can't be made, and
        ``CheckpointError`` for one that another process is writing into, that was written with other settings, or that
        isn't a run folder.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, FolderLock.acquire(path))
            try:
                folder._begin(settings, resume, frozenset(may_change))
            except BaseException:
                folder.close()
                raise
        except OSError as error:
            reason = error.strerror or error
            raise SettingsError(f"can't make the run folder: {reason}", where=str(path)) from error
        return folder

    def _begin(self, settings: Any, resume: bool, may_change: frozenset[str]) -> None:
        """Check what is there, and write ``config.yaml`` and ``environment.json``."""
        config, environment = self.path / "config.yaml", self.path / "environment.json"
        occupied = not _is_unused(self.path)
        if occupied and not resume:
            raise SettingsError(
                "the run folder is not empty",
                where=str(self.path),
                way_out="name another one, delete it, or go on with it: --resume auto",
            )
        record = environment_record()
        if occupied:
            if not config.is_file():
                raise CheckpointError(
                    "not a run folder: it has no config.yaml", where=str(self.path), way_out="name another one"
                )
            _check_same(config, settings, may_change)
            if environment.is_file():
                record = _resumed(environment, record)
        for path in filter(is_leftover, list(self.path.iterdir())):
            path.unlink()
        write_atomic(environment, json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")
        write_atomic(config, to_yaml(settings).encode())
        sync_folder(self.path.resolve().parent)

    def close(self) -> None:
        """Let other processes open the folder."""
        if self.lock is not None:
            self.lock.release()

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def calibration(self) -> Path:
        return self.path / "calibration.jsonl"

    @property
    def bad_batches(self) -> Path:
        return self.path / "bad_batches.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def records(self) -> tuple[Path, ...]:
        """The files that are appended to."""
        return self.metrics, self.samples, self.calibration, self.bad_batches

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Append one line to ``metrics.jsonl``: ``step``, then the metrics in the order given.

        Values are numbers (Python's, NumPy's or tensors of one element), strings, booleans or None. JSON has no NaN and
        no infinities: they are written as the strings "NaN", "Infinity", "-Infinity", which ``read_metrics`` and
        Python's ``float`` turn back.
        Raises ``TypeError`` for any other value, and ``CheckpointError`` if the line can't be written.
        """
        _append(self.metrics, [{"step": step, **metrics}])

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append one line per sample to ``samples.jsonl``: ``step``, then the sample's fields (as in ``log``)."""
        _append(self.samples, [{"step": step, **sample} for sample in samples])

    def log_calibration(self, tables: Mapping[str, Any], step: int) -> None:
        """Append one line to ``calibration.jsonl``: ``step``, then the tables (as in ``log``)."""
        _append(self.calibration, [{"step": step, **tables}])

    def log_bad_batch(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append one line per row of a batch that was skipped to ``bad_batches.jsonl`` (as in ``log``)."""
        _append(self.bad_batches, [{"step": step, **row} for row in rows])

    def sync(self) -> None:
        """Have the system write everything that was logged to the disk: a checkpoint must not outlive its metrics."""
        for path in self.records:
            if path.is_file():
                with write_errors(path), path.open("rb+") as file:
                    os.fsync(file.fileno())

    def truncate_after(self, step: int) -> None:
        """Forget what was logged after ``step``, and a last line that was only half written.

        A run that is resumed from the checkpoint of ``step`` writes those lines again; −1 forgets everything.
        Each file is replaced in one step, and only if it changes; of a file that can't be read none is changed. Raises
        ``DataError`` as ``read_lines`` does, and ``CheckpointError`` if a file can't be written.
        """
        kept = {
            path: b"".join(line for line, record in _records(path) if record["step"] <= step)
            for path in self.records
            if path.is_file()
        }
        for path, content in kept.items():
            if len(content) != path.stat().st_size:
                with write_errors(path):
                    write_atomic(path, content)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file of one JSON object a line, as they stand there.

    A last line that was cut in the middle (the run was killed, or is writing) is left out. Raises ``DataError`` for any
    other line that isn't a record.
    """
    return [record for _, record in _records(Path(path))]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, with NaN and infinities as floats again."""
    return [{name: _NOT_FINITE.get(str(value), value) for name, value in line.items()} for line in read_lines(path)]


def environment_record() -> dict[str, Any]:
    """What the run's numbers may depend on beside its settings: versions, machine, threads, code, command line."""
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "git": _git_revision(),
    }
    # Asking for threads and devices must not be what loads PyTorch.
    if torch := sys.modules.get("torch"):
        record["num_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            record["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
            record["cuda"] = torch.version.cuda
    return record


def _is_unused(folder: Path) -> bool:
    """Whether a run can start in ``folder``: it is empty, or holds only what a run writes before its first step (one
    that stopped at a mistyped model, say). Settings alone, without the environment beside them, are the user's own."""
    inside = [path for path in folder.iterdir() if path.name != LOCK_NAME and not is_leftover(path)]
    names = {path.name for path in inside}
    return not inside or (
        "environment.json" in names
        and all(_is_unused(path) if path.is_dir() else path.name in _FIRST_FILES for path in inside)
    )


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    if not records:
        return
    lines = [
        json.dumps({name: _plain(name, value) for name, value in record.items()}, ensure_ascii=False, allow_nan=False)
        for record in records
    ]
    # Opened for each call: closing flushes, and nothing is held open over a crash. A lone surrogate, which UTF-8 has no
    # bytes for, becomes the escape that JSON has for it.
    with write_errors(path), path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write("".join(line + "\n" for line in lines))


def _plain(name: str, value: Any) -> Any:
    """A value that JSON can hold."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{index}]", inner) for index, inner in enumerate(value)]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    raise TypeError(f"{name}: a {type(value).__name__} can't be logged")


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line and its record. Only newlines end lines: texts may hold the other separators."""
    *lines, _cut = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "not a record with a step", where=f"{path}:{number}", way_out="mend or remove it"
            ) from error
        yield line + b"\n", record


def _resumed(environment: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The first environment, with the new one added to those of earlier resumptions."""
    try:
        first = json.loads(environment.read_bytes())
        return first | {"resumed": [*first.get("resumed", []), record]}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError("can't be read", where=str(environment), way_out="mend or delete it") from error


def _check_same(config: Path, settings: Any, may_change: frozenset[str]) -> None:
    try:
        old = values_from_yaml(config.read_text(encoding="utf-8"))
    except (SettingsError, UnicodeDecodeError) as error:
        what = error.what if isinstance(error, SettingsError) else "it is not UTF-8 text"
        raise CheckpointError(
            f"can't be read: {what}", where=str(config), way_out="mend it, or start a new run in another folder"
        ) from error
    new = values_from_yaml(to_yaml(settings))
    # A setting that only one of the two has came or went with another version of the library.
    changed = [key for key in old.keys() & new.keys() - may_change if old[key] != new[key]]
    if changed:
        listed = "; ".join(f"{key}: {old[key]} then, {new[key]} now" for key in sorted(changed))
        raise CheckpointError(
            f"this run was started with other settings ({listed})",
            where=str(config),
            way_out=f"resume with --config {config}, or start a new run in another folder",
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _git_revision() -> dict[str, Any] | None:
    """Revision of the checkout the run was started in, and whether tracked files were changed; None outside of one."""
    try:
        revision = _git("rev-parse", "HEAD")
        return {"revision": revision, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
