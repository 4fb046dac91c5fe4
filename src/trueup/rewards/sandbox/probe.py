"""Tries to break out, inside: prints the names of the limits that do not hold.

The job, on descriptor 3, is a JSON object: ``limits``, those that have to hold, ``folder``, one that is there outside,
and ``port``, on which somebody outside listens.
"""

import ctypes
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path


def breaks(attempt: Callable[[], object]) -> bool:
    """Whether an attempt that has to fail goes through."""
    try:
        attempt()
    except (OSError, MemoryError):
        return False
    return True


def start_processes(count: int) -> None:
    """So many, all of them alive at once."""
    started = []
    try:
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                signal.pause()
            started.append(pid)
    finally:
        for pid in started:
            os.kill(pid, signal.SIGKILL)


def write_files(count: int, size: int) -> None:
    for index in range(count):
        Path(f"{size}-{index}").write_bytes(bytes(size))


def writable() -> None:
    if os.statvfs("/usr").f_flag & os.ST_RDONLY:
        raise OSError


def filtered() -> None:
    """A call that needs no privileges."""
    if ctypes.CDLL(None).memfd_create(b"probe", 0) == -1:
        raise OSError


def main() -> None:
    with os.fdopen(3) as file:
        job = json.load(file)
    limits = job["limits"]
    of_file = limits["file_bytes"]
    attempts: dict[str, Callable[[], object]] = {
        "network": lambda: socket.create_connection(("127.0.0.1", job["port"]), 1),
        "files outside": Path(job["folder"]).stat,
        "read-only system": writable,
        "processes": lambda: start_processes(limits["num_processes"]),
        "memory": lambda: bytearray(limits["memory_bytes"]),
        "size of a file": lambda: write_files(1, of_file + 1),
        "size of all files": lambda: write_files(1 + limits["disk_bytes"] // of_file, of_file),
        "number of files": lambda: write_files(limits["num_files"] + 1, 0),
        "privileges": lambda: os.chroot("/"),
        "system calls": filtered,
    }
    print(", ".join(name for name, attempt in attempts.items() if breaks(attempt)))


if __name__ == "__main__":
    main()
