"""Rows from any source: files of several kinds, packed or not, ``datasets`` objects, dicts. One at a time.

Every row carries the place it came from. What a row means is not known here: see ``formats``.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trueup.data import reasoning_gym
from trueup.errors import DataError, require_extra

Fields = Mapping[str, Any]
Source = str | Path | Iterable[Any]
"""A path, a glob, ``hf:NAME``, ``reasoning-gym:TASK``, a ``datasets`` object, an iterable of dicts, or a sequence of
these."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a source: its columns, and the place to name in messages (``file:line`` where lines exist)."""

    where: str
    fields: Fields


def read_rows(source: Source, *, split: str | None = None) -> Iterator[Row]:
    """Rows of ``source``, one at a time; nothing larger than a row (Parquet: a batch of rows) is held.

    ``source``: a path or glob of ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` (each also ``.gz`` or ``.zst``);
    ``hf:NAME``, ``hf:NAME:CONFIG`` or ``hf:NAME@SPLIT`` for a Hugging Face dataset; ``reasoning-gym:TASK?…`` for the
    entries of a task (``reasoning_gym``); a ``datasets`` object; an iterable of dicts; or a sequence of any of these.
    ``split`` picks one of a Hugging Face dataset's parts (default ``train``).

    Raises ``DataError`` for a source that is missing, damaged or of unknown kind, and for a record that is no record.
    """
    for row in scan_rows(source, split=split):
        if isinstance(row, DataError):
            raise row
        yield row


def scan_rows(source: Source, *, split: str | None = None) -> Iterator[Row | DataError]:
    """As ``read_rows``, but a bad record comes as a ``DataError`` in its place wherever reading can go on after it."""
    if isinstance(source, str | Path):
        if isinstance(source, str) and source.startswith("hf:"):
            yield from _hub_rows(source, split)
        elif isinstance(source, str) and source.startswith(reasoning_gym.PREFIX):
            for number, row in enumerate(reasoning_gym.reasoning_gym_rows(source)):
                yield Row(f"{source} entry {number}", row)
        else:
            for path in _paths(source):
                yield from _file_rows(path)
    elif isinstance(source, Mapping):
        yield from scan_rows(_choose_split(source, split))
    elif isinstance(source, Iterable):
        for number, item in enumerate(source, 1):
            if isinstance(item, str | Path):
                yield from scan_rows(item, split=split)
            else:
                yield _row(item, f"row {number}")
    else:
        raise DataError(
            f"data can't be read from a {type(source).__name__}",
            way_out="give a path, a glob, hf:NAME, a datasets object or an iterable of dicts",
        )


def source_name(source: Source) -> str | None:
    """What to call a source in messages, where it has a name."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, Sequence) and source and all(isinstance(item, str | Path) for item in source):
        return ", ".join(map(str, source))
    return None


def _row(record: Any, where: str) -> Row | DataError:
    """A record as a row; a bare string is a text."""
    if isinstance(record, Mapping):
        return Row(where, record)
    if isinstance(record, str):
        return Row(where, {"text": record})
    return DataError(
        f"expected an object with columns, found {type(record).__name__}",
        where=where,
        way_out='a record looks like {"prompt": ..., "chosen": ..., "rejected": ...}',
    )


def _paths(source: str | Path) -> list[Path]:
    """The files that a path or glob names, in sorted order. A file that exists under the very name wins over a glob."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError("this is a folder, not a file", where=str(path), way_out=f"name its files: '{path}/*.jsonl'")
    if path.exists():
        return [path]
    # Path.glob takes no absolute pattern.
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
    if not found:
        raise DataError("no such file, and no file matches it", where=str(path), way_out="check the path")
    return [name for name in found if name.is_file()]


def _file_rows(path: Path) -> Iterator[Row | DataError]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in {".gz", ".zst"} else ""
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = readers.get(suffixes[-1] if suffixes else "")
    if reader is None:
        raise DataError(
            "unknown kind of file",
            where=str(path),
            way_out=f"rename it to end in one of {', '.join(readers)} (each also with .gz or .zst)",
        )
    with _opened(path, packing) as stream:
        yield from reader(stream, str(path))


@contextmanager
def _opened(path: Path, packing: str) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked; a damaged archive or an unreadable file becomes a ``DataError``."""
    damaged: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    try:
        if packing == ".gz":
            with gzip.open(path, "rb") as stream:
                yield stream  # type: ignore[misc]
        elif packing == ".zst":
            # Arrow's reader, unlike that of `zstandard`, takes a file that stops half-way as an error.
            pyarrow = require_extra("pyarrow", "data")
            damaged = (OSError,)
            with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd") as packed:
                yield io.BufferedReader(packed)
        else:
            with path.open("rb") as stream:
                yield stream
    except damaged as error:
        raise DataError(
            f"the compressed file is damaged or cut short ({error})",
            where=str(path),
            way_out="fetch or write the file again",
        ) from error
    except OSError as error:
        raise DataError(f"the file can't be read ({error.strerror or error})", where=str(path)) from error


def _jsonl_rows(stream: IO[bytes], name: str) -> Iterator[Row | DataError]:
    for number, line in enumerate(stream, 1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield _row(json.loads(text), where)
        except (ValueError, RecursionError) as error:
            yield _broken_json(error, where)


def _json_rows(stream: IO[bytes], name: str) -> Iterator[Row | DataError]:
    """The elements of a JSON array, or JSON values one after the other, read piece by piece."""
    reader = _JsonReader(stream, name)
    in_array = reader.take("[")
    while not reader.at_end(closing="]" if in_array else None):
        where, value = reader.value()
        yield _row(value, where)
        if in_array and not reader.take(",") and not reader.at_end(closing="]"):
            raise DataError("expected ',' or ']' here", where=reader.where, way_out="mend the JSON at this line")


class _JsonReader:
    """JSON values from a stream: a window of text that grows only until the next value is whole."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = io.TextIOWrapper(stream, encoding="utf-8-sig")
        self._name, self._line = name, 1
        self._text, self._start = "", 0
        self._decoder = json.JSONDecoder()

    @property
    def where(self) -> str:
        return f"{self._name}:{self._line}"

    def _more(self, size: int) -> bool:
        try:
            piece = self._stream.read(size)
        except UnicodeDecodeError as error:
            raise _broken_json(error, self.where) from error
        self._text, self._start = self._text[self._start :] + piece, 0
        return bool(piece)

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._start, end)
        self._start = end

    def _peek(self) -> str:
        """The next character that is not white space, without taking it; empty at the end."""
        while True:
            end = self._start
            while end < len(self._text) and self._text[end] in " \t\r\n":
                end += 1
            self._advance(end)
            if end < len(self._text):
                return self._text[end]
            if not self._more(1 << 16):
                return ""

    def take(self, character: str) -> bool:
        if self._peek() != character:
            return False
        self._advance(self._start + 1)
        return True

    def at_end(self, closing: str | None) -> bool:
        """Whether the values are over; behind the closing bracket nothing may follow."""
        if closing is None:
            return self._peek() == ""
        if self._peek() == "":
            raise DataError("the JSON array has no end", where=self.where, way_out="the file looks cut short")
        if self._peek() != closing:
            return False
        rest = self._text[self._start + 1 :] + self._stream.read()
        if rest.strip():
            raise DataError("something follows the JSON array", where=self.where, way_out="mend the JSON")
        return True

    def value(self) -> tuple[str, Any]:
        self._peek()
        where, size = self.where, 1 << 16
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._start)
            except (ValueError, RecursionError) as error:
                # Perhaps only cut by the window: double it. At the end of the file the error is real.
                if isinstance(error, RecursionError) or not self._more(size):
                    raise _broken_json(error, where, self._line) from error
                size *= 2
            else:
                self._advance(end)
                return where, value


def _broken_json(error: Exception, where: str, first_line: int = 1) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        line = f" on line {first_line + error.lineno - 1}" if error.lineno > 1 else ""
        what = f"not valid JSON: {error.msg} at character {error.colno}{line}"
    elif isinstance(error, UnicodeDecodeError):
        what = f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}"
    elif isinstance(error, RecursionError):
        what = "JSON nested too deeply"
    else:
        what = f"not valid JSON: {error}"
    return DataError(what, where=where, way_out="mend or remove the record; .jsonl wants one JSON object a line")


def _csv_rows(stream: IO[bytes], name: str) -> Iterator[Row | DataError]:
    # Python refuses cells beyond 131,072 characters unless told; a long dialogue is longer.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"not valid CSV ({error})", where=where, way_out="mend the quotes or the encoding"
            ) from error
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                raise DataError("two columns have the same name", where=where, way_out="rename one in the header")
        elif not cells:
            continue
        elif len(cells) != len(header):
            yield DataError(
                f"{len(cells)} cells under {len(header)} columns",
                where=where,
                way_out="quote cells that hold commas or line breaks",
            )
        else:
            yield Row(where, dict(zip(header, cells, strict=True)))


def _parquet_rows(stream: IO[bytes], name: str) -> Iterator[Row]:
    require_extra("pyarrow", "data")
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:
        # Parquet is read from its end: a compressed one has to be unpacked to disk first.
        if isinstance(stream, gzip.GzipFile) or not stream.seekable():
            shutil.copyfileobj(stream, unpacked)
            stream = unpacked
        number = 0
        try:
            # As they stand, its defaults would read the whole file ahead.
            file = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 16)
            for batch in file.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{name}: row {number}", fields)
        except (
            pyarrow.ArrowException,
            ValueError,
            OverflowError,
        ) as error:  # text that isn't UTF-8, times out of range
            raise DataError(f"not a readable Parquet file ({error})", where=name, way_out="write it again") from error


def _hub_rows(source: str, split: str | None) -> Iterator[Row | DataError]:
    datasets = require_extra("datasets", "data")
    name, _, named_split = source.removeprefix("hf:").partition("@")
    name, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=named_split or split or "train", streaming=True)
        for number, record in enumerate(dataset, 1):
            yield _row(record, f"{source}: row {number}")
    except Exception as error:  # the hub client raises whatever its transport raises
        raise DataError(
            f"the dataset can't be loaded ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            where=source,
            way_out="check the name, the configuration (hf:NAME:CONFIG), the split (hf:NAME@SPLIT) and the connection",
        ) from error


def _choose_split(splits: Mapping[str, Any], split: str | None) -> Any:
    chosen = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if chosen not in splits:
        raise DataError(f"there is no split {chosen!r}", way_out=f"choose one of {', '.join(map(str, splits))}")
    return splits[chosen]
