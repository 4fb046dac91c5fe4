"""Writing files so that a kill or a power cut leaves the old content or the new, never half of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

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
