"""One process at a time in a run folder.

The lock is the operating system's (``flock``) on the file ``.lock`` inside, so that it ends with its process, however
that ends: a lock is never stale. On systems without ``flock`` (Windows) nothing is locked.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path

from trueup.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = ".lock"


class FolderLock:
    """A folder that is ours until ``release``, the end of the process, or the last reference to this object.

    In one process the last to ask gets it: a run that failed may still hang in a traceback, and must not bar the next.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.release = weakref.finalize(self, _release, folder / LOCK_NAME, descriptor, os.getpid())

    @classmethod
    def acquire(cls, folder: Path) -> FolderLock | None:
        """Lock ``folder``, which must exist; None where the system or the file system has no locks.

        Raises ``CheckpointError``, which names the process, for a folder that another one has locked, and ``OSError``
        for one that nothing can be written to.
        """
        release(folder)
        name, folder = folder, folder.resolve()  # the working directory may be another one when it is released
        descriptor = _locked(folder, name)
        if descriptor is None:
            return None
        os.truncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        lock = _HELD[folder] = cls(folder, descriptor)
        return lock


_HELD: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()


def release(folder: Path) -> None:
    """Give back the lock of ``folder``, if this process has it."""
    if lock := _HELD.get(folder.resolve()):
        lock.release()


def _release(path: Path, descriptor: int, owner: int) -> None:
    """Give the folder free, and leave nothing in it. A process that was forked from the owner only lets go."""
    if os.getpid() == owner:
        # Removed while it is still locked: whoever opened it meanwhile sees that it has no name any more.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    os.close(descriptor)


def _locked(folder: Path, name: Path) -> int | None:
    """The descriptor of the folder's lock file, locked; ``name`` is what the user calls the folder."""
    if fcntl is None:
        return None
    path = folder / LOCK_NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(descriptor, path):
                return descriptor
        except BlockingIOError as error:
            owner = os.read(descriptor, 20).decode("ascii", "replace") or "unknown"
            os.close(descriptor)
            raise CheckpointError(
                f"another process (pid {owner}) is writing into this run folder",
                where=str(name),
                way_out="wait for it, stop it, or name another folder with --output",
            ) from error
        except OSError:  # a file system without locks
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        os.close(descriptor)  # its owner has just removed it: try again with a new one


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
