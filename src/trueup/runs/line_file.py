"""A file of JSON lines that a command writes part by part, and goes on with when it was stopped.

Whole parts are appended in one call each, so what a stopped run leaves is whole lines and at most one that is cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from trueup.errors import CheckpointError, SettingsError
from trueup.runs.files import write_errors

Resume = Literal["no", "auto", "yes"]
Line = dict[str, Any]
Kept = TypeVar("Kept")


def check_free(output: Path, resume: Resume) -> None:
    """Raise ``SettingsError`` for a file that is there without ``resume``, ``CheckpointError`` for none under "yes"."""
    if resume == "yes" and not output.exists():
        raise CheckpointError(
            "there is nothing to go on with", where=str(output), way_out="--resume auto starts anew then"
        )
    if resume == "no" and output.exists():
        raise SettingsError(
            "there is such a file already",
            where=str(output),
            way_out="name another --output, remove it, or go on with it: --resume auto",
        )


def begun(output: Path, resume: Resume, what: str, opening: str, read: Callable[[Line], Kept]) -> list[Kept]:
    """What ``read`` keeps of each whole line of a file that a run left; a last line that was cut is cut away.

    No file has none. ``what`` the lines are of, for messages; ``opening``: how every line begins, by which a line that
    was cut is known. ``read`` may raise ``ValueError``, ``KeyError`` or ``TypeError`` for a line that is no such line.

    Raises as ``check_free`` does, and ``CheckpointError`` for a file that holds something else.
    """
    check_free(output, resume)
    if not output.exists():
        return []
    kept: list[Kept] = []
    size = 0
    with write_errors(output), output.open("rb+") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                if not opening.encode().startswith(line[: len(opening)]):
                    raise _not_ours(output, number, what)
                file.truncate(size)
                break
            try:
                kept.append(read(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise _not_ours(output, number, what) from error
            size += len(line)
    return kept


def keep_lines(output: Path, number: int) -> None:
    """Cut the file behind its first ``number`` lines."""
    with write_errors(output), output.open("rb+") as file:
        for _ in range(number):
            file.readline()
        file.truncate(file.tell())


def append(output: Path, lines: Iterable[Line]) -> None:
    """Write whole lines behind those that are there, in one call."""
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    with write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)


def _not_ours(output: Path, number: int, what: str) -> CheckpointError:
    return CheckpointError(
        f"not a line of {what}", where=f"{output}:{number}", way_out="name another file with --output"
    )
