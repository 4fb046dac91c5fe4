"""Damaged files of every kind: a reader gives rows or a ``TrueupError`` that names the file, never anything else.

``TRUEUP_FUZZ_SECONDS=600 pytest tests/fault/test_fuzz_readers.py -m slow`` goes on for ten minutes with new damage; the
everyday test sees the same few hundred files every time.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from trueup.data.data_format import Task
from trueup.data.formats import read_examples
from trueup.data.report import ReadReport
from trueup.data.rows import scan_rows
from trueup.errors import TrueupError

ROWS: dict[str, list[dict[str, Any]]] = {
    "explicit": [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "näh", "margin": n / 2} for n in range(6)],
    "messages": [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "模型 🎉"}]}
        for n in range(4)
    ],
    "ranked": [{"prompt": "a", "completions": ["b", "c", "d"], "scores": [3.0, 2.0, 1.0]} for _ in range(3)],
    "hh": [
        {"chosen": f"\n\nHuman: {n}\n\nAssistant: yes", "rejected": f"\n\nHuman: {n}\n\nAssistant: no"}
        for n in range(4)
    ],
}
JUNK = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"\\",
    b"\\ud800",
    b"{",
    b"]",
    b",",
    b"\n",
    b"\r",
    b"NaN",
    b"1e999",
]
JUNK += [b"[" * 2000, b"9" * 5000, b"PAR1", b"\x1f\x8b", b"(\xb5/\xfd", b"-1", b"null", b"\xe2\x80\xa8"]

SECONDS = float(os.environ.get("TRUEUP_FUZZ_SECONDS", "60"))

Damage = Callable[[bytes, np.random.Generator], bytes]


def flip(content: bytes, random: np.random.Generator) -> bytes:
    """A few bits the other way."""
    damaged = bytearray(content)
    for _ in range(random.integers(1, 9)):
        damaged[random.integers(len(damaged))] ^= 1 << int(random.integers(8))
    return bytes(damaged)


def cut(content: bytes, random: np.random.Generator) -> bytes:
    return content[: random.integers(len(content))]


def remove(content: bytes, random: np.random.Generator) -> bytes:
    start = int(random.integers(len(content)))
    return content[:start] + content[start + int(random.integers(1, 40)) :]


def insert(content: bytes, random: np.random.Generator) -> bytes:
    at = int(random.integers(len(content) + 1))
    return content[:at] + JUNK[random.integers(len(JUNK))] + content[at:]


def repeat(content: bytes, random: np.random.Generator) -> bytes:
    start, end = sorted(int(at) for at in random.integers(len(content) + 1, size=2))
    return content[:end] + content[start:end] * int(random.integers(1, 4)) + content[end:]


def replace(content: bytes, random: np.random.Generator) -> bytes:
    return random.bytes(int(random.integers(200)))


TASKS: tuple[Task, ...] = ("sft", "preference")
DAMAGE: list[Damage] = [flip, cut, remove, insert, repeat, replace]


def packed(content: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(content, mtime=0)
    return pyarrow.compress(content, codec="zstd", asbytes=True) if packing == ".zst" else content


def written(rows: list[dict[str, Any]], kind: str) -> bytes:
    """A good file."""
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    flat = [
        {name: value if isinstance(value, str | float) else json.dumps(value) for name, value in row.items()}
        for row in rows
    ]
    stream = io.BytesIO()
    if kind == ".csv":
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(flat), stream)
    else:
        # As it stands, so that damage reaches the text itself.
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, stream, compression="none", use_dictionary=False)
    return stream.getvalue()


KINDS = list(itertools.product((".jsonl", ".json", ".csv", ".parquet"), ("", ".gz", ".zst")))


def damaged_files(kind: str, packing: str, seed: int) -> Iterator[bytes]:
    """Without end: good files with one to three kinds of damage, before or after they were packed."""
    random = np.random.default_rng([seed, KINDS.index((kind, packing))])
    good = [written(rows, kind) for rows in ROWS.values()]
    while True:
        content = good[random.integers(len(good))]
        after = bool(random.integers(2))
        content = packed(content, packing) if after else content
        for _ in range(random.integers(1, 4)):
            content = DAMAGE[random.integers(len(DAMAGE))](content or b"x", random)
        yield content if after else packed(content, packing)


def check(path: Path, content: bytes) -> None:
    """Whatever comes is a row, an example or a typed error, with its place."""
    path.write_bytes(content)
    found: list[Any] = []
    try:
        found += scan_rows(path)
    except TrueupError as error:
        found.append(error)
    assert all(str(each.where).startswith(str(path)) for each in found)
    for task, strict in itertools.product(TASKS, (True, False)):
        report, kept = ReadReport(), 0
        try:
            for _ in read_examples(path, task=task, report=report, strict=strict):
                kept += 1
        except TrueupError:
            continue
        assert kept == report.num_kept


@pytest.mark.parametrize(("kind", "packing"), KINDS)
def test_a_good_file_is_read(kind: str, packing: str, tmp_path: Path):
    """The damage is done to files that would have been read."""
    for name, rows in ROWS.items():
        path = tmp_path / f"{name}{kind}{packing}"
        path.write_bytes(packed(written(rows, kind), packing))
        assert len(list(read_examples(path, task="sft", report=ReadReport()))) == len(rows)


@pytest.mark.parametrize(("kind", "packing"), KINDS)
def test_damaged_files(kind: str, packing: str, tmp_path: Path):
    for content in itertools.islice(damaged_files(kind, packing, seed=0), 60):
        check(tmp_path / f"data{kind}{packing}", content)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_damaged_files_for_a_long_time(tmp_path: Path):
    """Every kind in turn, with damage that no run before has seen. What fails is kept, and named."""
    seed = time.time_ns()
    files = [(tmp_path / f"data{kind}{packing}", damaged_files(kind, packing, seed)) for kind, packing in KINDS]
    deadline, count = time.monotonic() + SECONDS, 0
    while time.monotonic() < deadline:
        for path, contents in files:
            try:
                check(path, next(contents))
            except BaseException as error:
                raise AssertionError(f"file {count} of seed {seed}, kept as {path}") from error
            count += 1
    print(f"{count:,} files in {SECONDS:.0f} s, seed {seed}")
