"""Running untrusted Python, and reading what it says without believing it.

The program runs in namespaces of its own (``launch``): it sees no network, no other process, and of the file system
the system's and Python's folders, read-only, and an empty folder in memory. It has no capabilities, and limits on
processor time, memory, processes, files and output. All of its processes end with it. This takes Linux with user
namespaces; where one of the limits does not hold, nothing is run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from trueup.errors import RewardError
from trueup.rewards.sandbox import inside, launch, probe

SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/nix/store")
MEBI = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    """Of each of its processes."""
    memory_bytes: int = 512 * MEBI
    """Address space of each of its processes."""
    num_processes: int = 16
    """Processes and threads together, the first included."""
    file_bytes: int = 16 * MEBI
    """Largest file."""
    disk_bytes: int = 64 * MEBI
    """All files together; they lie in memory."""
    num_files: int = 256
    open_files: int = 64
    output_bytes: int = MEBI
    """Standard output, standard error and outcomes, each."""


PROBED = Limits(
    wall_seconds=60, num_processes=8, memory_bytes=256 * MEBI, disk_bytes=4 * MEBI, file_bytes=MEBI, num_files=64
)
"""What ``check_confinement`` tries out: small, so that it is quick."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a program ended. ``exit_code``: 128 + the signal that killed it. ``stopped``: the limit that it ran into on
    the outside, of time or output. ``outcomes``: what came on the channel of the tests."""

    exit_code: int | None
    stopped: str | None
    stdout: bytes
    stderr: bytes
    outcomes: bytes

    @property
    def in_order(self) -> bool:
        return self.exit_code == 0 and self.stopped is None


@dataclass(frozen=True, kw_only=True)
class Confined:
    """A program that runs inside, and the ends of its pipes: ``setup`` is empty unless it could not be started."""

    process: subprocess.Popen[bytes]
    outcomes: IO[bytes]
    setup: IO[bytes]

    @property
    def streams(self) -> list[IO[bytes]]:
        """Standard output, standard error, outcomes, setup."""
        return [self.process.stdout, self.process.stderr, self.outcomes, self.setup]  # pyright: ignore[reportReturnType]

    def kill(self) -> None:
        """End the launcher and, with it, every process inside."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def confined(
    source: str, *arguments: str, job: str = "", stdin: str | None = None, limits: Limits, quiet: bool = False
) -> Iterator[Confined]:
    """Start Python code inside, with nothing checked, and end it in any case.

    ``stdin`` None: it reads what is written to the process. ``quiet``: nobody reads what it prints.
    """
    with tempfile.TemporaryDirectory(prefix="trueup-") as root, contextlib.ExitStack() as opened:
        pipes = [os.pipe() for _ in ("outcomes", "setup")]
        outcomes, setup = (opened.enter_context(os.fdopen(read, "rb", buffering=0)) for read, _ in pipes)
        written = [write for _, write in pipes]
        task = {
            "root": root,
            "parent": os.getpid(),
            "folders": shown_folders(),
            "limits": asdict(limits),
            "arguments": [sys.executable, "-I", "-c", source, *arguments],
            "stdin": stdin,
            "job": job,
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", launch.__file__, *map(str, written)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
                stderr=subprocess.DEVNULL if quiet else subprocess.PIPE,
                bufsize=0,
                cwd="/",
                env={},
                pass_fds=written,
                start_new_session=True,
            )
        finally:
            for descriptor in written:
                os.close(descriptor)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                opened.enter_context(stream)
        running = Confined(process=process, outcomes=outcomes, setup=setup)
        opened.callback(running.kill)
        content = json.dumps(task).encode()
        with contextlib.suppress(BrokenPipeError):
            write_all(process.stdin, f"{len(content)}\n".encode() + content)
        yield running


def run_inside(job: dict[str, Any], *, stdin: str = "", limits: Limits) -> Ran:
    """Run a job (see ``inside``) and collect what it writes, up to the limits.

    Raises ``RewardError`` with the reason where the program can't be confined.
    """
    with confined(source_of(inside), job=json.dumps(job), stdin=stdin, limits=limits) as running:
        ran, setup = collect(running, limits)
    if setup:
        raise refusal(setup.decode(errors="replace"))
    return ran


@functools.cache
def check_confinement() -> None:
    """Try out that every limit holds here. Raises ``RewardError`` with one that doesn't, or with what is missing."""
    if sys.platform != "linux":
        raise refusal(f"this is {sys.platform}, not Linux")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        job = json.dumps({"limits": asdict(PROBED), "folder": folder, "port": server.getsockname()[1]})
        with confined(source_of(probe), job=job, stdin="", limits=PROBED) as running:
            ran, setup = collect(running, PROBED)
    if setup or not ran.in_order:
        reason = setup or ran.stderr or f"the trial ended with {ran.stopped or ran.exit_code}".encode()
        raise refusal(reason.decode(errors="replace").strip().splitlines()[-1])
    if broken := ran.stdout.decode().strip():
        raise refusal(f"not limited: {broken}")


def refusal(reason: str) -> RewardError:
    return RewardError(f"untrusted code can't be confined here: {reason}", way_out=WAY_OUT)


def write_all(stream: Any, content: bytes) -> None:
    """To a pipe without a buffer, which takes only so much at once."""
    view = memoryview(content)
    while view:
        view = view[stream.write(view) :]


def collect(running: Confined, limits: Limits) -> tuple[Ran, bytes]:
    """Read all streams to their ends, or until a limit is hit and everything is killed."""
    streams = running.streams
    contents = {stream: bytearray() for stream in streams}
    deadline = time.monotonic() + limits.wall_seconds
    stopped = None
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and stopped is None:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                stream: Any = key.fileobj
                piece = os.read(stream.fileno(), 1 << 16)
                if not piece:
                    selector.unregister(stream)
                contents[stream] += piece
            if any(len(content) > limits.output_bytes for content in contents.values()):
                stopped = "output"
            elif time.monotonic() >= deadline:
                stopped = "time"
    if stopped:
        running.kill()
    code = running.process.wait()
    stdout, stderr, outcomes, setup = (bytes(contents[stream]) for stream in streams)
    exit_code = None if stopped else code if code >= 0 else 128 - code
    return Ran(exit_code=exit_code, stopped=stopped, stdout=stdout, stderr=stderr, outcomes=outcomes), setup


WAY_OUT = "run on Linux ≥ 5.12 with user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces)"


def source_of(module: ModuleType) -> str:
    """The text of a module that stands alone, to be run inside, where this package is not."""
    return Path(str(module.__file__)).read_text(encoding="utf-8")


@functools.cache
def shown_folders() -> list[str]:
    """What a program may read: the system's folders and those of this Python, behind every link."""
    python = [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])]
    there = [folder for folder in (*SYSTEM_FOLDERS, *python) if os.path.lexists(folder)]
    shown = [path for folder in there for path in (folder, os.path.realpath(folder))]
    return [path for path in dict.fromkeys(shown) if path != "/"]
