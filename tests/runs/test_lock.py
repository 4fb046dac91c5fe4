from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trueup.errors import CheckpointError
from trueup.runs.lock import LOCK_NAME, FolderLock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")

HOLD = """
import sys
from pathlib import Path
from trueup.runs.lock import FolderLock

lock = FolderLock.acquire(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of ``tmp_path`` until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def test_another_process_is_named_and_kept_out(tmp_path, other):
    with pytest.raises(CheckpointError, match=rf"another process \(pid {other.pid}\) is writing") as raised:
        FolderLock.acquire(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_killed_process_holds_nothing(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / LOCK_NAME).exists()
    lock = FolderLock.acquire(tmp_path)
    assert lock is not None
    assert (tmp_path / LOCK_NAME).read_text() == str(os.getpid())


def test_a_process_that_ends_leaves_no_file(tmp_path, other):
    assert other.stdin is not None
    other.stdin.close()
    other.wait()
    assert not list(tmp_path.iterdir())


def held_elsewhere(folder: Path) -> bool:
    """Whether a process forked from this one is kept out."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            FolderLock.acquire(folder)
        except CheckpointError:
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_process_neither_shares_nor_frees_the_lock(tmp_path):
    lock = FolderLock.acquire(tmp_path)
    assert lock is not None
    assert held_elsewhere(tmp_path)
    assert held_elsewhere(tmp_path)
    lock.release()
    assert not held_elsewhere(tmp_path)


def test_it_ends_with_its_object(tmp_path):
    lock = FolderLock.acquire(tmp_path)
    assert lock is not None
    del lock
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_in_one_process_the_last_to_ask_gets_it(tmp_path):
    first = FolderLock.acquire(tmp_path)
    second = FolderLock.acquire(tmp_path)
    assert first is not None
    assert second is not None
    first.release()
    assert held_elsewhere(tmp_path)
    second.release()
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_t_be_written_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        FolderLock.acquire(tmp_path / "missing")


# Each holder makes a folder that must not exist yet, and takes it away again: two at a time would collide. The file of
# the lock comes and goes all the while, which is where such locks go wrong.
CONTEND = """
import sys, time
from pathlib import Path
from trueup.errors import CheckpointError
from trueup.runs.lock import FolderLock

folder, held = Path(sys.argv[1]), 0
deadline = time.monotonic() + 5
while held < 60 and time.monotonic() < deadline:
    try:
        lock = FolderLock.acquire(folder)
    except CheckpointError:
        time.sleep(0.0005)
        continue
    (folder / "inside").mkdir()
    (folder / "inside").rmdir()
    lock.release()
    held += 1
print(held)
"""


def test_never_two_at_a_time(tmp_path):
    commands = [[sys.executable, "-c", CONTEND, str(tmp_path)]] * 3
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert err == ""
        assert int(out) > 0
    assert not list(tmp_path.iterdir())
