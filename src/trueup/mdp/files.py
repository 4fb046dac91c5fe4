"""Processes in files: ``.npz`` for arrays of any size, JSON to be read and written by hand."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from trueup.errors import DataError
from trueup.mdp.outcomes import Outcomes
from trueup.mdp.tabular import TabularMDP
from trueup.runs.files import write_atomic

ARRAYS = ("transitions", "rewards", "start", "terminal", "gamma")
SPARSE = ("data", "indices", "indptr", "shape")
OUTCOME = ("state", "action", "next_state", "probability", "reward")


def save_mdp(mdp: TabularMDP, file: str | Path) -> Path:
    """Write ``file``: ``.npz`` (sparse: what can happen, as ``scipy.sparse`` has it) or ``.json`` (a list of outcomes).

    Raises ``DataError`` for another ending.
    """
    file = Path(file)
    rest = {"start": mdp.start, "terminal": mdp.terminal, "gamma": mdp.gamma}
    if file.suffix == ".npz":
        matrix = mdp.transitions
        parts = {f"transitions_{name}": getattr(matrix, name) for name in SPARSE}
        content = io.BytesIO()
        np.savez_compressed(content, rewards=mdp.rewards, **parts, **rest)
        write_atomic(file, content.getvalue())
    elif file.suffix == ".json":
        rows = np.repeat(np.arange(mdp.transitions.shape[0]), np.diff(mdp.transitions.indptr))
        state, action = np.divmod(rows, mdp.num_actions)
        columns = state, action, mdp.transitions.indices, mdp.transitions.data, mdp.rewards
        outcomes = [
            dict(zip(OUTCOME, row, strict=True)) for row in zip(*(each.tolist() for each in columns), strict=True)
        ]
        whole = {name: np.asarray(value).tolist() for name, value in rest.items()}
        whole |= {"num_actions": mdp.num_actions, "outcomes": outcomes}
        write_atomic(file, (json.dumps(whole, indent=1) + "\n").encode())
    else:
        raise DataError(f"unknown ending {file.suffix!r}", where=str(file), way_out="choose .npz or .json")
    return file


def load_mdp(file: str | Path, *, gamma: float | None = None) -> TabularMDP:
    """Read a process from ``file``; a ``gamma`` that is given takes the place of the file's.

    ``.npz``: what ``save_mdp`` writes, or arrays ``transitions`` [S, A, S'], ``rewards`` in a form that ``TabularMDP``
    takes, ``gamma``, and if wanted ``start`` and ``terminal``. ``.json``: the same names with nested lists, or
    ``outcomes``, a list of objects with state, action, next_state, probability and reward (beside them, if higher
    numbers than theirs are to exist, ``num_states`` and ``num_actions``). Nothing in a file is executed. Raises
    ``DataError`` with the file's name for one that can't be read, or holds no process.
    """
    file = Path(file)
    try:
        content = _read(file)
        if gamma is not None:
            content["gamma"] = gamma
        if "gamma" not in content:
            raise DataError("there is no gamma", way_out="put it into the file, or give one")
        return _process(content)
    except DataError as error:
        where = f"{file}: {error.where}" if error.where else str(file)
        raise DataError(error.what, where=where, way_out=error.way_out) from error
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"can't be read as a process: {error}", where=str(file), way_out="see trueup.mdp.files.load_mdp"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in arrays.files}
        if "transitions_data" in content:
            data, indices, indptr, shape = (content.pop(f"transitions_{name}") for name in SPARSE)
            content["transitions"] = sparse.csr_array((data, indices, indptr), shape=tuple(shape))
            content["rewards"] = sparse.csr_array((content["rewards"], indices, indptr), shape=tuple(shape))
        return content | {"gamma": float(content["gamma"])} if "gamma" in content else content
    if file.suffix == ".json":
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise DataError("there is no object at the top")
        return content
    raise DataError(f"unknown ending {file.suffix!r}", way_out="choose .npz or .json")


def _process(content: dict[str, Any]) -> TabularMDP:
    known = {name: content.pop(name) for name in ARRAYS if content.get(name) is not None}
    outcomes = content.pop("outcomes", None)
    sizes = {name: content.pop(name, 0) for name in ("num_states", "num_actions")}
    if content:
        raise DataError(f"unknown: {', '.join(sorted(content))}", way_out=f"known are {', '.join(ARRAYS)}, outcomes")
    for name in ("start", "terminal"):
        if name in known:
            known[name] = np.asarray(known[name])
    if outcomes is None:
        return TabularMDP(**known)
    columns = Outcomes(*(np.array([row[name] for row in outcomes]) for name in OUTCOME))
    return columns.process(
        num_states=max(
            sizes["num_states"], len(known.get("terminal", ())), _highest(columns.states, columns.next_states)
        ),
        num_actions=max(sizes["num_actions"], _highest(columns.actions)),
        **known,
    )


def _highest(*indices: np.ndarray) -> int:
    return 1 + max((int(each.max()) for each in indices if len(each)), default=0)
