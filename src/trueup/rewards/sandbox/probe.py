"""Tries to break out, inside: prints the names of the limits that do not hold. The job is a path that is outside."""

import os
import resource
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


def start_processes() -> None:
    """One more than is allowed, all of them alive at once."""
    started = []
    try:
        for _ in range(resource.getrlimit(resource.RLIMIT_NPROC)[0]):
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


def main() -> None:
    with os.fdopen(3) as file:
        outside = file.read()
    of_file, of_memory = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS))
    disk = os.statvfs(".")
    attempts: dict[str, Callable[[], object]] = {
        "network": lambda: socket.create_connection(("127.0.0.1", 9), 1),
        "files outside": Path(outside).stat,
        "read-only system": Path("/usr/trueup-probe").touch,
        "processes": start_processes,
        "memory": lambda: bytearray(of_memory),
        "size of a file": lambda: write_files(1, of_file + 1),
        "size of all files": lambda: write_files(1 + disk.f_blocks * disk.f_bsize // of_file, of_file),
        "number of files": lambda: write_files(disk.f_files + 1, 0),
        "privileges": lambda: os.setuid(0) if os.getuid() else os.chroot("/"),
    }
    print(", ".join(name for name, attempt in attempts.items() if breaks(attempt)))


if __name__ == "__main__":
    main()
