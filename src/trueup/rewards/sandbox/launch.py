"""Starts untrusted Python where it can do no harm. Run as a script, with nothing but the standard library.

Three processes. The launcher takes new user, mount, network, process-id, IPC and host-name namespaces; ``init`` is
process 1 in them, builds a root of read-only system folders and an empty folder in memory, and gives the old root up;
the program runs as its child without any capability and under resource limits. When ``init`` ends, the kernel ends
every process of the namespace, whatever session or group it moved to; ``init`` ends when the program does, or when the
launcher is killed, and the launcher is killed with the process that asked.

The arguments are the numbers of the descriptors that become 4 and 5. Standard input begins with the length of a JSON
object, a line break and the object: ``arguments``, ``stdin``, ``job``, ``limits``, ``folders``, ``root``, ``parent``.
The program gets ``stdin`` as standard input (null: what follows the object), ``job`` on descriptor 3, and writes what
it has found to descriptor 4. What goes wrong on the way there is written to descriptor 5 and makes the exit code 2.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JOB, RESULT, SETUP = 3, 4, 5
"""Descriptors."""

NOBODY = 65534
INSIDE = "/box"

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 24, 38, 22
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MACHINES = tuple(SYS_PIVOT_ROOT)
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REFUSED = {
    # memory that no limit counts
    "shmget": (29, 194),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425),
    # more than a program needs of the kernel
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
}
"""System calls that are refused inside, by their numbers on ``MACHINES``."""
LINUX_CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name the step that an ``OSError`` stopped."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{what}: {error.strerror or error}") from error


def call(function: Any, *arguments: Any) -> None:
    """A C function that returns −1 on failure. Raises ``OSError``."""
    if function(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def prctl(option: int, value: int) -> None:
    call(libc.prctl, option, *map(ctypes.c_ulong, (value, 0, 0, 0)))


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    call(libc.mount, *encoded[:3], ctypes.c_ulong(flags), encoded[3])


def take_namespaces() -> None:
    """New namespaces, in which the caller's user is root, and nobody is nobody where that can be had."""
    uid, gid, pid = os.geteuid(), os.getegid(), os.getpid()
    unshared_read, unshared_write = os.pipe()
    helper = os.fork() if uid == 0 else None
    if helper == 0:
        # Only a process that stayed outside, and is root there, may map a second user.
        os.close(unshared_write)
        if not os.read(unshared_read, 1):
            os._exit(1)
        try:
            for kind in ("uid", "gid"):
                Path(f"/proc/{pid}/{kind}_map").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
        except OSError:
            os._exit(1)
        os._exit(0)
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    with doing("new namespaces (unshare)"):
        call(libc.unshare, flags)
    os.write(unshared_write, b".")
    if helper is None or os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]) != 0:
        with doing("user mapping of the new namespace"):
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1\n")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1\n")


def build_root(root: str, folders: list[str], limits: dict[str, int]) -> None:
    """Make ``root`` the file system: ``folders`` read-only, an empty ``INSIDE`` in memory, and nothing else."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    with doing("no namespaces inside (max_user_namespaces)"):
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for folder in folders:
        show(root, folder)
    for device in ("null", "zero", "random", "urandom"):
        target = f"{root}/dev/{device}"
        os.makedirs(f"{root}/dev", exist_ok=True)  # noqa: PTH103
        Path(target).touch()
        mount(f"/dev/{device}", target, None, MS_BIND)
    Path(f"{root}{INSIDE}").mkdir()
    options = f"size={limits['disk_bytes']},nr_inodes={limits['num_files']},mode=777"
    mount("tmpfs", f"{root}{INSIDE}", "tmpfs", MS_NOSUID | MS_NODEV, options)
    set_attributes(root, MOUNT_ATTR_RDONLY, recursive=False)
    os.chdir(root)
    with doing("the new root (pivot_root)"):
        call(libc.syscall, SYS_PIVOT_ROOT[platform.machine()], b".", b".")
        call(libc.umount2, b".", MNT_DETACH)
    os.chdir(INSIDE)


def show(root: str, path: str) -> None:
    """The same folder, link or file inside, read-only."""
    inside = Path(root + path)
    if inside.exists() or inside.is_symlink():
        return
    inside.parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_symlink():
        inside.symlink_to(os.readlink(path))  # noqa: PTH115
        return
    if Path(path).is_dir():
        inside.mkdir()
    else:
        inside.touch()
    with doing(f"{path} read-only inside"):
        mount(path, str(inside), None, MS_BIND | MS_REC)
        set_attributes(str(inside), MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, recursive=True)


def set_attributes(target: str, attributes: int, *, recursive: bool) -> None:
    """``mount_setattr``, which keeps the attributes that a mount has already."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    call(libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, ctypes.byref(wanted), 32)


def drop_privileges(mapped: bool) -> None:
    """No capability is left, and none can be gained."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, *map(ctypes.c_ulong, (capability, 0, 0, 0))) == -1:
            break  # beyond the last one
    if mapped:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    call(libc.capset, ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def filter_calls() -> None:
    """Refuse, with EPERM, the system calls of ``REFUSED``, and every call of another architecture's numbering."""
    machine = platform.machine()
    refused = [numbers[MACHINES.index(machine)] for numbers in REFUSED.values()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
    rules = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    # x86_64 has a second numbering, above this
    rules.append((at_least, len(refused) + 1, 0, 0x40000000))
    rules += [(equal, len(refused) - index, 0, number) for index, number in enumerate(refused)]
    rules += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    program = struct.pack("@HP", len(rules), ctypes.addressof(code))
    with doing("a filter of system calls (seccomp)"):
        call(libc.prctl, PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.c_char_p(program), *map(ctypes.c_ulong, (0, 0)))


def limit_resources(limits: dict[str, int]) -> None:
    cpu = limits["cpu_seconds"]
    values = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: limits["num_processes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in values.items():
        resource.setrlimit(kind, value if isinstance(value, tuple) else (value, value))


def in_memory(content: str, descriptor: int) -> None:
    """A file without a name, open at its start."""
    file = os.memfd_create("input", 0)
    data = content.encode("utf-8", "surrogatepass")
    while data:
        data = data[os.write(file, data) :]
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, descriptor)
    os.close(file)


def run_program(task: dict[str, Any], mapped: bool) -> None:
    """Become the program. Only returns by an exception."""
    if task["stdin"] is not None:
        in_memory(task["stdin"], 0)
    in_memory(task["job"], JOB)
    os.set_inheritable(RESULT, True)
    os.set_inheritable(SETUP, False)
    os.closerange(SETUP + 1, 1 << 16)
    limit_resources(task["limits"])
    drop_privileges(mapped)
    filter_calls()
    environment = {"PATH": "/usr/bin:/bin", "HOME": INSIDE, "TMPDIR": INSIDE, "LANG": "C.UTF-8"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with doing(f"starting {task['arguments'][0]} inside"):
        os.execve(task["arguments"][0], task["arguments"], environment)


def ended(pid: int) -> int:
    """Wait for a child, as a shell gives its status: 128 + the signal that killed it."""
    while True:
        found, status = os.wait()
        if found == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def in_child(function: Any, *arguments: Any) -> int:
    """Run ``function`` in a child; the child's process id. What it raises is written to ``SETUP``."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os._exit(function(*arguments) or 0)
    except BaseException as error:
        fail(error)
    raise AssertionError


def fail(error: BaseException) -> None:
    os.write(SETUP, f"{error or type(error).__name__}".encode())
    os._exit(2)


def init(task: dict[str, Any]) -> int:
    """Process 1 of the namespaces."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)  # process 1 doesn't die of signals from inside that have no handler
    mapped = len(Path("/proc/self/uid_map").read_text().splitlines()) > 1
    build_root(task["root"], task["folders"], task["limits"])
    return ended(in_child(run_program, task, mapped))


def read(size: int) -> bytes:
    """So many bytes of standard input, and none of those behind them."""
    content = b""
    while len(content) < size:
        piece = os.read(0, size - len(content))
        if not piece:
            raise EOFError("the task is cut short")
        content += piece
    return content


def read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += read(1)
    return line


def main() -> None:
    given = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 16) for number in sys.argv[1:]]
    for descriptor, target in zip(given, (RESULT, SETUP), strict=True):
        os.dup2(descriptor, target)
    os.closerange(SETUP + 1, 1 << 10)
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        task = json.loads(read(int(read_line())))
        if os.getppid() != task["parent"]:
            return  # whoever asked has gone before this was ready
        if platform.machine() not in SYS_PIVOT_ROOT:
            raise OSError(f"{platform.machine()} is not a machine that this knows")
        take_namespaces()
        os._exit(ended(in_child(init, task)))
    except BaseException as error:
        fail(error)


if __name__ == "__main__":
    main()
