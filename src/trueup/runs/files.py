"""Writing files so that a kill or a power cut leaves the old content or the new, never half of it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trueup.errors import CheckpointError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomic(path: Path, content: bytes) -> None:
    """Replace the content of ``path`` in one step: written aside, synced, renamed over it.

    Raises ``OSError`` as the operating system gives it; ``path`` is then as it was.
    """
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable. A no-op on systems where a folder can't be opened (Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below ``folder`` durable, the innermost first."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            with Path(root, name).open("rb+") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def is_leftover(path: Path) -> bool:
    """Whether a file is what a kill left of ``write_atomic``."""
    return re.fullmatch(r"\..+\.tmp-\d+", path.name) is not None and path.is_file()


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """What the system has against writing ``path`` (no room, no permission, a folder that is gone) as a
    ``CheckpointError``."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: BaseException, kept: str = "") -> CheckpointError:
    """The message for a write that failed; ``kept`` says what is safe nevertheless."""
    reason = "no room to write it" if is_disk_full(error) else f"can't be written ({error})"
    mend = "free some space (or keep fewer checkpoints)" if is_disk_full(error) else "mend that"
    return CheckpointError(
        f"{reason}; {kept}" if kept else reason, where=str(path), way_out=f"{mend} and go on with --resume auto"
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether a failed write failed for want of room (disk, quota or file-size limit).

    Libraries with writers of their own (PyTorch's archive, safetensors) raise other types than ``OSError``: for those
    the error's text and its cause decide.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL
    if any(os.strerror(code) in str(error) for code in _FULL):
        return True
    inner = error.__cause__ or error.__context__
    return inner is not None and is_disk_full(inner)
