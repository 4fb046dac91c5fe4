"""Hostile programs: what they try comes to nothing, and nothing of them is left."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from trueup.errors import RewardError
from trueup.rewards.sandbox import launch
from trueup.rewards.sandbox.run import MEBI, Limits, check_confinement, run_inside

QUICK = Limits(wall_seconds=20, cpu_seconds=2)


pytestmark = pytest.mark.usefixtures("confinement")


def run(code: str, limits: Limits = QUICK, stdin: str = ""):
    return run_inside({"code": textwrap.dedent(code), "tests": None}, stdin=stdin, limits=limits)


def processes_with(word: str) -> list[str]:
    """The command lines and environments of all processes that hold ``word``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found


def test_a_program_reads_and_writes():
    ran = run("import sys; print(sum(map(int, input().split()))); sys.stderr.write('x'); sys.exit(3)", stdin="1 2 3\n")
    assert (ran.stdout, ran.stderr, ran.exit_code, ran.stopped) == (b"6\n", b"x", 3, None)
    assert not ran.in_order


def test_a_long_input_arrives_whole():
    text = "é" * MEBI + "\n"
    assert run("import sys; print(len(sys.stdin.read()))", stdin=text).stdout == f"{MEBI + 1}\n".encode()


def test_it_starts_in_an_empty_folder_with_a_clean_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    ran = run("import os; print(os.listdir('.'), dict(os.environ))")
    assert ran.stdout.startswith(b"[] {")
    assert b"s3cret" not in ran.stdout


def test_it_sees_no_file_of_ours(tmp_path):
    (tmp_path / "answers.txt").write_text("42")
    folders = [str(tmp_path), str(Path(__file__).parent), "/home", "/etc/passwd", "/proc/self", "/sys/class"]
    assert run(f"import os; print([os.path.exists(path) for path in {folders!r}])").stdout == b"%r\n" % ([False] * 6)


def test_an_endless_loop_is_ended_by_its_processor_time():
    ran = run("while True: pass", Limits(wall_seconds=60, cpu_seconds=1))
    assert ran.stopped is None
    assert ran.exit_code in (128 + 24, 128 + 9)  # SIGXCPU, SIGKILL


def test_a_program_that_sleeps_is_ended():
    ran = run("print('here', flush=True); import time; time.sleep(1000)", Limits(wall_seconds=0.6))
    assert (ran.stopped, ran.exit_code, ran.stdout) == ("time", None, b"here\n")


def test_a_fork_bomb_stays_small_and_leaves_nothing():
    word = "bomb-" + os.urandom(8).hex()
    code = f"""
        import subprocess, sys
        number = 0
        try:
            while True:
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", "{word}"])
                number += 1
        except OSError:
            print(number)
    """
    ran = run(code, Limits(wall_seconds=20, num_processes=8))
    assert ran.exit_code == 0
    assert 0 < int(ran.stdout) < 8
    assert processes_with(word) == []


def test_a_thread_bomb_stays_small():
    ran = run(
        """
        import threading, time
        number = 0
        try:
            while True:
                threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
                number += 1
        except (RuntimeError, MemoryError):
            print(number)
        """
    )
    assert int(ran.stdout) < QUICK.num_processes


def test_a_daemon_in_a_session_of_its_own_is_ended_with_the_program():
    word = "daemon-" + os.urandom(8).hex()
    ran = run(
        f"""
        import os, subprocess, sys, time
        child = subprocess.Popen(
            [sys.executable, "-c", "print(1, flush=True); import time; time.sleep(1000)", "{word}"],
            start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.readline()
        print("started")
        """
    )
    assert (ran.stdout, ran.exit_code) == (b"started\n", 0)
    assert processes_with(word) == []


@pytest.mark.parametrize(
    "code",
    ["bytearray(1 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 20))", "'x' * (1 << 40)"],
    ids=["one block", "bit by bit", "absurd"],
)
def test_memory_is_limited(code):
    ran = run(code, Limits(wall_seconds=60, memory_bytes=128 * MEBI))
    assert ran.exit_code == 1
    assert b"MemoryError" in ran.stderr


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("open('a', 'wb').write(bytes(20 << 20))", b"File too large"),
        ("for i in range(9): open(str(i), 'wb').write(bytes(10 << 20))", b"No space left"),
        ("for i in range(1000): open(str(i), 'wb').close()", b"No space left"),
        ("files = [open('/dev/null') for _ in range(100)]", b"Too many open files"),
        ("open('/usr/a', 'w')", b"Read-only file system"),
        ("open('/a', 'w')", b"Read-only file system"),
        ("import os; os.rmdir('/usr/bin')", b"Read-only file system"),
        ("import os, sys; os.remove(sys.executable)", b"Read-only file system"),
    ],
)
def test_files_are_limited(code, reason):
    ran = run(code)
    assert ran.exit_code == 1
    assert reason in ran.stderr


@pytest.mark.parametrize("call", ["memfd_create(b'x', 0)", "shmget(0, 4096, 0o1600)", "unshare(0x10000000)"])
def test_system_calls_that_lead_around_the_limits_are_refused(call):
    ran = run(f"import ctypes; lib = ctypes.CDLL(None, use_errno=True); print(lib.{call}, ctypes.get_errno())")
    assert ran.stdout == b"-1 1\n"


def test_there_is_no_network():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = run(
            f"""
            import socket
            for address in [("127.0.0.1", {port}), ("1.1.1.1", 53)]:
                try:
                    socket.create_connection(address, 2)
                except OSError as error:
                    print(error.errno)
            print(socket.if_nameindex())
            """
        )
    assert ran.stdout == b"101\n101\n[(1, 'lo')]\n"


def test_abstract_sockets_are_its_own():
    import socket

    name = "\0trueup-" + os.urandom(8).hex()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        ran = run(f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})")
    assert b"ConnectionRefusedError" in ran.stderr


def test_it_can_kill_nobody_outside():
    ran = run(
        f"""
        import os, signal
        for pid in {[os.getpid(), os.getppid(), 1, -1]!r}:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        print("alive")
        """
    )
    assert (ran.stdout, ran.exit_code) == (b"alive\n", 0)


def test_gigabytes_of_output_end_the_program():
    ran = run("while True: print('x' * 100000)", Limits(wall_seconds=60, cpu_seconds=60))
    assert ran.stopped == "output"
    assert len(ran.stdout) < 2 * MEBI


def test_a_program_that_closes_everything_is_waited_for():
    ran = run("import os, time; os.closerange(0, 100); time.sleep(0.3); os._exit(7)")
    assert ran.exit_code == 7


def test_the_death_of_the_one_who_asked_ends_it():
    word = "orphan-" + os.urandom(8).hex()
    script = f"""
from trueup.rewards.sandbox.run import Limits, run_inside
code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(1000)', '{word}'])"
run_inside({{"code": code, "tests": None}}, limits=Limits(wall_seconds=1000))
"""
    asker = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_for(lambda: any("cmdline" in path for path in processes_with("time.sleep(1000)\0" + word)))
    finally:
        asker.kill()
        asker.wait()
    wait_for(lambda: not processes_with(word))


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------- holes, and what says so

HOLES = {
    "network": (" | CLONE_NEWNET", ""),
    "processes": ("resource.RLIMIT_NPROC: limits", "resource.RLIMIT_RTPRIO: 0 and limits"),
    "memory": ("resource.RLIMIT_AS:", "resource.RLIMIT_RTPRIO: 0 and"),
    "size of a file": ("resource.RLIMIT_FSIZE: limits", "resource.RLIMIT_RTPRIO: 0 and limits"),
    "privileges": ("    drop_privileges(mapped)\n", ""),
    "system calls": ("    filter_calls()\n", ""),
    "read-only system": ("MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID", "MOUNT_ATTR_NOSUID"),
    "files outside": ("    for folder in folders:\n", "    for folder in ['/tmp', *folders]:\n"),
    "size of all files": ("size={limits['disk_bytes']}", "size=1g"),
    "number of files": ("nr_inodes={limits['num_files']}", "nr_inodes=0"),
}


@pytest.fixture
def changed_launcher(tmp_path, monkeypatch):
    """The launcher with one piece of its text replaced."""

    def change(old: str, new: str) -> None:
        text = Path(launch.__file__).read_text()
        assert text.count(old) == 1
        (tmp_path / "launch.py").write_text(text.replace(old, new))
        monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
        monkeypatch.setattr("tempfile.tempdir", "/tmp")
        check_confinement.cache_clear()

    yield change
    check_confinement.cache_clear()


@pytest.mark.parametrize("hole", HOLES)
def test_a_limit_that_does_not_hold_is_found(hole, changed_launcher):
    changed_launcher(*HOLES[hole])
    with pytest.raises(RewardError, match=f"can't be confined here: not limited: .*{hole}"):
        check_confinement()


def test_it_is_refused_where_there_are_no_namespaces(changed_launcher):
    changed_launcher("        call(libc.unshare, flags)", "        raise PermissionError(1, 'Operation not permitted')")
    with pytest.raises(RewardError, match="new namespaces \\(unshare\\): Operation not permitted") as caught:
        check_confinement()
    assert "user namespaces" in str(caught.value)
    with pytest.raises(RewardError, match="can't be confined here: new namespaces"):
        run("print(1)")


def test_it_is_refused_on_another_system(monkeypatch):
    check_confinement.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RewardError, match="this is darwin, not Linux"):
        check_confinement()


def test_it_is_refused_on_an_unknown_machine(changed_launcher):
    changed_launcher('SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}', "SYS_PIVOT_ROOT = {'vax': 1}")
    with pytest.raises(RewardError, match="is not a machine that this knows"):
        check_confinement()
