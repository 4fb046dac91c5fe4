"""Checkpoints that a kill at any moment can't spoil.

::

    checkpoints/step-000200/model/          whatever ``save_model`` writes (Hugging Face layout)
    checkpoints/step-000200/state/state.pt  everything else the run needs to go on: tensors and plain values, no pickle
    checkpoints/step-000200/manifest.json   every file with its size and SHA-256

A checkpoint is written into a hidden folder beside, every file and folder is synced to the disk, and only then is it
renamed: a folder called ``step-…`` is whole, or was damaged afterwards, which the manifest shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trueup.errors import CheckpointError
from trueup.runs.files import is_disk_full, sync_folder, sync_tree, unwritable
from trueup.runs.folder import RunFolder


def save_checkpoint(
    run_folder: RunFolder | Path,
    step: int,
    *,
    save_model: Callable[[Path], object],
    state: Mapping[str, Any],
    keep_last: int | None = None,
) -> Path:
    """Write ``checkpoints/step-…``, and return it.

    ``save_model`` gets an empty folder to write the model to. ``state`` is a nested dict, list or tuple of tensors,
    numbers, strings, booleans and None. ``keep_last`` removes older checkpoints once the new one is safe.
    If a whole checkpoint of this step is there already, it stays as it is: a run reaches a step in one state only.

    Raises ``CheckpointError`` when the disk is full or can't be written; earlier checkpoints are untouched. Raises
    ``TypeError`` for a state that couldn't be read back. Whatever else ``save_model`` raises passes through, with
    nothing left behind.
    """
    _check_plain(state, "state")
    folder = _checkpoints(run_folder)
    checkpoint = folder / f"step-{step:06d}"
    aside = folder / f".{checkpoint.name}.tmp-{os.getpid()}"
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if checkpoint.exists():
            check_checkpoint(checkpoint)
        else:
            _write(aside, step, save_model, state)
            aside.rename(checkpoint)
            sync_folder(folder)
        if keep_last is not None:
            prune(run_folder, keep_last)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) or is_disk_full(error):
            raise unwritable(checkpoint, error, _what_is_whole(run_folder)) from error
        raise
    return checkpoint


def latest_checkpoint(run_folder: RunFolder | Path) -> Path | None:
    """The checkpoint with the highest step, or None. What a kill left half written has another name and isn't seen.

    The checkpoint is not examined: ``load_state`` and ``check_checkpoint`` do that.
    """
    return max(_all_checkpoints(run_folder), key=checkpoint_step, default=None)


def load_latest(run_folder: RunFolder | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; None where there is no checkpoint.

    Damaged ones that are newer are renamed to ``damaged-step-…``, with a warning: the run writes them anew. Raises
    ``CheckpointError`` where there are checkpoints, but none is whole; then none is renamed.
    """
    damaged: list[tuple[Path, CheckpointError]] = []
    for checkpoint in sorted(_all_checkpoints(run_folder), key=checkpoint_step, reverse=True):
        try:
            state = load_state(checkpoint)
        except CheckpointError as error:
            damaged.append((checkpoint, error))
            continue
        for path, error in damaged:
            kept = _rename_damaged(path)
            warnings.warn(f"{path}: {error.what}; it is kept as {kept.name}", stacklevel=2)
        return checkpoint, state
    if damaged:
        raise damaged[0][1]
    return None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The ``state`` that ``save_checkpoint`` was given, with every tensor on the CPU.

    The file is read with ``weights_only=True``: it can't run code. Raises ``CheckpointError`` for a checkpoint that is
    missing or damaged.
    """
    check_checkpoint(checkpoint)
    path = checkpoint / "state" / "state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive makes PyTorch raise
        raise _damaged(checkpoint, f"state/state.pt can't be read ({type(error).__name__})") from error


def check_checkpoint(checkpoint: Path) -> None:
    """Compare every file with the manifest. Raises ``CheckpointError`` that names the file and the way out."""
    if not checkpoint.is_dir():
        raise CheckpointError("there is no such checkpoint", where=str(checkpoint))
    try:
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(checkpoint, "manifest.json is missing or can't be read") from error
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise _damaged(checkpoint, f"{name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _damaged(checkpoint, f"{name} has {size:,} bytes and should have {expected['bytes']:,}")
        if "sha256" in expected and _sha256(path) != expected["sha256"]:  # earlier versions had none for large files
            raise _damaged(checkpoint, f"the content of {name} was changed")


def checkpoint_step(checkpoint: Path) -> int:
    """The optimiser steps done before this checkpoint was written, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def prune(run_folder: RunFolder | Path, keep_last: int) -> None:
    """Remove all but the last ``keep_last`` ≥ 1 checkpoints.

    Each is renamed before it is emptied, so that a kill in between leaves no checkpoint that looks whole and isn't.
    """
    if keep_last < 1:
        raise ValueError("keep_last must be at least 1")
    for checkpoint in sorted(_all_checkpoints(run_folder), key=checkpoint_step)[:-keep_last]:
        doomed = checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old-{os.getpid()}"))
        shutil.rmtree(doomed, ignore_errors=True)


def _write(aside: Path, step: int, save_model: Callable[[Path], object], state: Mapping[str, Any]) -> None:
    (aside / "model").mkdir(parents=True)
    (aside / "state").mkdir()
    save_model(aside / "model")
    # Through Python's file: PyTorch's own writer doesn't say why it failed.
    with (aside / "state" / "state.pt").open("wb") as file:
        torch.save(dict(state), file)
    paths = sorted(path for path in aside.rglob("*") if path.is_file())
    manifest = {"step": step, "files": {path.relative_to(aside).as_posix(): _fingerprint(path) for path in paths}}
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync_tree(aside)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rename_damaged(checkpoint: Path) -> Path:
    kept = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(kept, ignore_errors=True)
    return checkpoint.rename(kept)


def _checkpoints(run_folder: RunFolder | Path) -> Path:
    return run_folder.checkpoints if isinstance(run_folder, RunFolder) else Path(run_folder) / "checkpoints"


def _all_checkpoints(run_folder: RunFolder | Path) -> list[Path]:
    return [path for path in _checkpoints(run_folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def _check_plain(value: Any, where: str) -> None:
    """Refuse before writing what ``weights_only=True`` would refuse when reading."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str | int):
                raise TypeError(f"{where}: the key {key!r} can't be saved in a checkpoint")
            _check_plain(inner, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{where}[{index}]")
    elif type(value) not in (int, float, bool, str, type(None)) and not isinstance(value, torch.Tensor):
        raise TypeError(f"{where}: a {type(value).__name__} can't be saved in a checkpoint")


def _damaged(checkpoint: Path, what: str) -> CheckpointError:
    before = [
        path for path in _all_checkpoints(checkpoint.parents[1]) if checkpoint_step(path) < checkpoint_step(checkpoint)
    ]
    earlier = max(before, key=checkpoint_step, default=None)
    return CheckpointError(
        f"the checkpoint is damaged: {what}",
        where=str(checkpoint),
        way_out=f"delete it; the run then goes on from {earlier.name if earlier else 'its start'}",
    )


def _what_is_whole(run_folder: RunFolder | Path) -> str:
    last = latest_checkpoint(run_folder)
    return f"{last.name} is whole" if last else "there is no checkpoint yet"
