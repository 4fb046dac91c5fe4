from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from trueup.errors import CheckpointError
from trueup.runs.files import is_disk_full, write_atomic, write_errors


def test_content_is_replaced(tmp_path):
    path = tmp_path / "config.yaml"
    write_atomic(path, b"a")
    write_atomic(path, b"b")
    assert path.read_bytes() == b"b"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_failure_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_atomic(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (PermissionError(errno.EACCES, "x"), False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("unexpected pos"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_full_disk_is_known_by_number_or_text(error, full):
    assert is_disk_full(error) is full


def test_a_full_disk_is_known_behind_another_error():
    def write_as_libraries_do() -> None:
        try:
            with Path("/dev/full").open("wb", buffering=0) as file:
                file.write(b"x")
        except OSError:
            raise RuntimeError("unexpected pos")  # noqa: B904

    with pytest.raises(RuntimeError) as raised:
        write_as_libraries_do()
    assert is_disk_full(raised.value)


def test_what_can_t_be_written_is_said_with_the_way_out(tmp_path):
    for error, what in (
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), r"metrics: no room to write it\n  → free some space"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), r"metrics: can't be written \(.*Read-only.*\n  → mend that"),
    ):
        with pytest.raises(CheckpointError, match=what), write_errors(tmp_path / "metrics"):
            raise error
    with pytest.raises(ZeroDivisionError), write_errors(tmp_path):
        raise ZeroDivisionError
