"""Every kind of file gives the same rows, one at a time, and says where a bad one is."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from trueup.data.rows import read_rows, scan_rows
from trueup.errors import DataError

ROWS = [{"prompt": f'p{n}, "quoted"\nnext line ü', "chosen": "é" * n, "rejected": f"r{n}"} for n in range(1, 8)]


def encoded(kind: str, rows: list[dict[str, str]] = ROWS) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, indent=1).encode()
    if kind == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=max(3, len(rows) // 3))
    return sink.getvalue()


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # the time of day would give a test another name in each worker


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


PACK = {"": bytes, ".gz": gz, ".zst": zstd}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"data.{kind}{packing}"
    path.write_bytes(PACK[packing](encoded(kind)))
    rows = list(read_rows(path))
    assert [dict(row.fields) for row in rows] == ROWS
    assert all(str(path) in row.where for row in rows)


def test_places_are_lines_where_there_are_lines(tmp_path: Path) -> None:
    for kind, wanted in {
        "jsonl": [":1", ":2", ":3"],
        "json": [":2", ":7", ":12"],  # an array with one bracket a line and three columns a row
        "csv": [":2", ":4", ":6"],  # every first cell holds a line break
        "parquet": [": row 1", ": row 2", ": row 3"],
    }.items():
        path = tmp_path / f"data.{kind}"
        path.write_bytes(encoded(kind))
        found = [row.where.removeprefix(str(path)) for row in itertools.islice(read_rows(path), 3)]
        assert found == wanted, kind


def test_globs_lists_and_names_that_look_like_globs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "odd[1].jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")

    def texts(source: object) -> list[str]:
        return [row.fields["text"] for row in read_rows(source)]  # type: ignore[arg-type]

    assert texts(str(tmp_path / "[ab].jsonl")) == ["a.jsonl", "b.jsonl"]
    assert texts(str(tmp_path / "odd[1].jsonl")) == ["odd[1].jsonl"]
    assert texts([tmp_path / "b.jsonl", str(tmp_path / "a.jsonl")]) == ["b.jsonl", "a.jsonl"]


def test_json_may_be_an_array_of_strings_or_values_in_a_row(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(' [ "one",\n "two" ] ')
    assert [(row.where, row.fields) for row in read_rows(path)] == [
        (f"{path}:1", {"text": "one"}),
        (f"{path}:2", {"text": "two"}),
    ]
    path.write_text('{"text": "one"}\n\n{"text":\n "two"}')
    assert [row.where for row in read_rows(path)] == [f"{path}:1", f"{path}:3"]
    path.write_text("[]")
    assert list(read_rows(path)) == []


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": '{"text": "x"}\n', "a.json": '[{"text": "x"}]', "a.csv": "text\nx\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert [dict(row.fields) for row in read_rows(tmp_path / name)] == [{"text": "x"}]


def test_datasets_objects_and_dicts() -> None:
    table = datasets.Dataset.from_list(ROWS)
    assert [dict(row.fields) for row in read_rows(table)] == ROWS
    assert [dict(row.fields) for row in read_rows(table.to_iterable_dataset())] == ROWS
    parts = datasets.DatasetDict(train=table.select([0]), test=table.select([1, 2]))
    assert [dict(row.fields) for row in read_rows(parts)] == ROWS[:1]
    assert [dict(row.fields) for row in read_rows(parts, split="test")] == ROWS[1:3]
    with pytest.raises(DataError, match=r"no split 'dev'(.|\n)*train, test"):
        list(read_rows(parts, split="dev"))
    assert [row.where for row in read_rows(iter(ROWS[:2]))] == ["row 1", "row 2"]


def test_a_dataset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands in for the hub: ``datasets`` takes both by the same call."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for part, rows in {"train": ROWS[:3], "test": ROWS[3:]}.items():
        (tmp_path / f"{part}.jsonl").write_bytes(encoded("jsonl", rows))
    assert [dict(row.fields) for row in read_rows(f"hf:{tmp_path}")] == ROWS[:3]
    assert [dict(row.fields) for row in read_rows(f"hf:{tmp_path}@test")] == ROWS[3:]
    with pytest.raises(DataError, match="can't be loaded"):
        list(read_rows(f"hf:{tmp_path}@nowhere"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: not valid JSON: Expecting value at character \d+\n"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a.jsonl:2: expected an object with columns, found list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a.jsonl:2: not valid UTF-8"),
        ("a.jsonl", b"[" * 200_000, r"a.jsonl:1: JSON nested too deeply"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", r"a.jsonl:1: not valid JSON"),
        ("a.json", b'[{"text": "x"},\n{"text": "y"', r"a.json:2: not valid JSON"),
        ("a.json", b'[{"text": "x"}\n{"text": "y"}]', r"a.json:2: expected ',' or '\]'"),
        ("a.json", b'[{"text": "x"},', r"a.json:1: the JSON array has no end"),
        ("a.json", b'[{"text": "x"}]\nmore', r"a.json:1: something follows the JSON array"),
        ("a.json", b'{"text": "x"}\n\xff', r"a.json:\d: not valid UTF-8"),
        ("a.json", b"[" * 200_000, r"a.json:1: JSON nested too deeply"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a.csv:3: 3 cells under 2 columns"),
        ("a.csv", b'a,b\n1,"2\n', r"a.csv:2: not valid CSV"),
        ("a.csv", b"a,a\n1,2\n", r"a.csv:1: two columns have the same name"),
        ("a.csv", b"a\n\xff\n", r"a.csv:\d: not valid CSV"),
        ("a.parquet", b"PAR1 no", r"a.parquet: not a readable Parquet file"),
        (
            "a.jsonl.gz",
            gz(b'{"text": "x"}\n' * 99)[:-9],
            r"a.jsonl.gz: the compressed file is damaged",
        ),
        ("a.jsonl.gz", b"not gzip", r"a.jsonl.gz: the compressed file is damaged"),
        ("a.jsonl.zst", zstd(b'{"text": "x"}\n' * 99)[:-4], r"a.jsonl.zst: the compressed file is damaged"),
        ("a.jsonl.zst", b"not zstd", r"a.jsonl.zst: the compressed file is damaged"),
        (
            "a.parquet.gz",
            gz(encoded("parquet"))[:-9],
            r"a.parquet.gz: the compressed file is damaged",
        ),
        ("a.xlsx", b"", r"a.xlsx: unknown kind of file(.|\n)*\.jsonl"),
        ("a", b"", r"a: unknown kind of file"),
    ],
)
def test_what_can_t_be_read_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(tmp_path / "none*.jsonl"))
    with pytest.raises(DataError, match=r"folder(.|\n)*\*\.jsonl"):
        list(read_rows(tmp_path))
    with pytest.raises(DataError, match="can't be read from a int"):
        list(read_rows(3))  # type: ignore[arg-type]


def test_reading_can_go_on_after_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\nnonsense\n\n{"text": "y"}\n')
    rows = list(scan_rows(path))
    assert [type(row).__name__ for row in rows] == ["Row", "DataError", "Row"]
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:2", f"{path}:4"]


def test_zstd_frames_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(b'{"text": "x"}\n') + zstd(b'{"text": "y"}\n'))
    assert [row.fields["text"] for row in read_rows(path)] == ["x", "y"]


def test_reading_needs_no_heavy_package() -> None:
    """Neither the readers nor the settings of ``trueup data check`` load what makes ``--help`` slow."""
    code = (
        "import sys, trueup.data.check, trueup.data.collate, trueup.cli.data;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'jinja2', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['rich']")  # tyro brings rich


def test_long_csv_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'x' * 300_000}\n")
    assert [len(row.fields["text"]) for row in read_rows(path)] == [300_000]


@pytest.mark.parametrize(
    ("kind", "packing"),
    [("jsonl", ""), ("jsonl", ".gz"), ("jsonl", ".zst"), ("json", ""), ("csv", ""), ("parquet", "")],
)
def test_the_file_is_never_held_whole(tmp_path: Path, kind: str, packing: str) -> None:
    """6 MB of text pass through; what Python holds at any time stays below 1.5 MB."""
    path = tmp_path / f"data.{kind}{packing}"
    rows = [{"text": f"{n:06d}" * 500} for n in range(2000)]
    path.write_bytes(PACK[packing](encoded(kind, rows)))
    del rows
    tracemalloc.start()
    try:
        count = sum(len(row.fields["text"]) == 3000 for row in read_rows(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 2000
    assert peak < 1.5e6
