"""Reading data: files of many kinds into rows, and rows of many shapes into one prompt with ranked completions.

Two steps that know nothing of each other. ``read_rows`` turns a source (files, a ``datasets`` object, dicts) into rows,
one at a time and each with the place it came from. A ``DataFormat`` turns one row into ``RankedCompletions``. What can't
be read raises ``DataError`` with the place; what can be read but teaches nothing is dropped and counted.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import itertools
import json
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from trueup.errors import DataError, require_extra
from trueup.records import Message, RankedCompletions, Text

Task = Literal["sft", "preference"]
Fields = Mapping[str, Any]
Source = str | Path | Iterable[Any]
Note = Callable[[str], None]

ROWS_TO_DETECT = 32
"""How many rows the format is judged by."""

# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a source: its columns, and the place to name in messages (``file:line`` where lines exist)."""

    where: str
    fields: Fields


def read_rows(source: Source, *, split: str | None = None) -> Iterator[Row]:
    """Rows of ``source``, one at a time; nothing larger than a row (Parquet: a batch of rows) is held.

    ``source``: a path or glob of ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` (each also ``.gz`` or ``.zst``);
    ``hf:NAME``, ``hf:NAME:CONFIG`` or ``hf:NAME@SPLIT`` for a Hugging Face dataset; a ``datasets`` object; an iterable
    of dicts; or a sequence of any of these. ``split`` picks one of a Hugging Face dataset's parts (default ``train``).

    Raises ``DataError`` for a source that is missing, damaged or of unknown kind, and for a record that is no record.
    """
    for row in scan_rows(source, split=split):
        if isinstance(row, DataError):
            raise row
        yield row


def scan_rows(source: Source, *, split: str | None = None) -> Iterator[Row | DataError]:
    """As ``read_rows``, but a record that can't be read comes as a ``DataError`` in its place where reading can go on."""
    if isinstance(source, str | Path):
        if isinstance(source, str) and source.startswith("hf:"):
            yield from _hub_rows(source, split)
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
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
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
            zstandard = require_extra("zstandard", "data")
            damaged = (*damaged, zstandard.ZstdError)
            with path.open("rb") as packed, io.BufferedReader(_ZstdStream(packed, zstandard)) as stream:
                yield stream
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


class _ZstdStream(io.RawIOBase):
    """Unpacks zstd frames. Unlike ``zstandard``'s own reader it takes a frame that stops half-way as an error."""

    def __init__(self, packed: IO[bytes], zstandard: Any) -> None:
        self._packed, self._zstandard = packed, zstandard
        self._frame: Any = None
        self._unread, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._unread = self._unread or self._packed.read(1 << 16)
            if not self._unread:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(self._unread)
            self._unread = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _jsonl_rows(stream: IO[bytes], name: str) -> Iterator[Row | DataError]:
    for number, line in enumerate(stream, 1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
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
            raise DataError(f"not valid CSV ({error})", where=where, way_out="mend the quotes or the encoding") from error
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
        if not isinstance(stream, io.BufferedReader) or isinstance(stream.raw, _ZstdStream):
            shutil.copyfileobj(stream, unpacked)
            stream = unpacked
        number = 0
        try:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{name}: row {number}", fields)
        except pyarrow.ArrowException as error:
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
    chosen = split or ("train" if "train" in splits else next(iter(splits), None) if len(splits) == 1 else None)
    if chosen not in splits:
        raise DataError(
            f"no split {chosen!r}" if chosen else "several splits and none chosen",
            way_out=f"choose one of {', '.join(map(str, splits)) or '(none)'}",
        )
    return splits[chosen]


# ------------------------------------------------------------------------------------------------- parts of a row


class _Dropped(Exception):
    """The row can be read, but there is nothing to learn from it. Its message is the reason that gets counted."""


ROLE_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}
"""Names of roles in the wild → the names that chat templates know."""

PROMPT_COLUMNS = ("prompt", "question")
COMPLETION_COLUMNS = ("completion", "response", "answer")
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")


def _column(fields: Fields, names: Sequence[str]) -> str | None:
    """The first of ``names`` that the row has a value for."""
    return next((name for name in names if fields.get(name) is not None), None)


def _need(fields: Fields, *names: str) -> Any:
    name = _column(fields, names)
    if name is None:
        columns = ", ".join(sorted(map(str, fields))) or "none"
        raise DataError(
            f"the column {' or '.join(map(repr, names))} is missing or empty (columns here: {columns})",
            way_out="complete the row, or tell the format with data_format",
        )
    return fields[name]


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{column!r} must be a string, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{column!r} holds half of a surrogate pair (character {error.start})", way_out="mend the text's encoding"
        ) from None
    return value


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{column!r} must be a number, found {value!r:.40}") from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise DataError(f"{column!r} must be a finite number, found {value!r:.40}")
    return number


def _list(value: Any, column: str) -> list[Any]:
    """A list; also from an array, and from a cell that holds JSON, since CSV has no lists."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise DataError(f"{column!r} must be a list")
    return list(value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _is_conversation(value: Any) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    if hasattr(value, "tolist"):
        value = value.tolist()
    return _is_message(value) or (isinstance(value, list | tuple) and bool(value) and all(map(_is_message, value)))


def _conversation(value: Any, column: str) -> tuple[Message, ...]:
    """A list of messages (or one message), with template role names and string contents."""
    records = [value] if isinstance(value, Mapping) else _list(value, column)
    return tuple(_message(record, f"{column}[{index}]") for index, record in enumerate(records))


def _message(record: Any, column: str) -> Message:
    if not _is_message(record):
        raise DataError(
            f"{column} is not a message", way_out='a message looks like {"role": "user", "content": "Hello"}'
        )
    # Parquet fills the keys that other rows have with null.
    message = {key: value for key, value in record.items() if value is not None}
    role = _string(message.pop("role", message.pop("from", None)), f"{column}.role")
    message.pop("from", None)
    if not re.fullmatch(r"[\w.-]+", role):
        raise DataError(f"{column}.role is {role!r:.40}, which is no role", way_out="use system, user, assistant or tool")
    content = message.pop("content", message.pop("value", None))
    message.pop("value", None)
    if isinstance(content, list | tuple):
        content = _joined_parts(content, f"{column}.content")
    if content is None and not message.get("tool_calls"):
        raise DataError(f"{column} has no content")
    return {"role": ROLE_NAMES.get(role, role), "content": _string(content or "", f"{column}.content"), **message}


def _joined_parts(parts: Sequence[Any], column: str) -> str:
    """Content given as typed parts: the texts of text parts, joined. Pictures and sounds can't be read."""
    if not all(isinstance(part, Mapping) and part.get("type") == "text" and "text" in part for part in parts):
        raise DataError(f"{column} holds parts that are not text", way_out="only text can be trained on")
    return "".join(_string(part["text"], column) for part in parts)


def _text(value: Any, column: str) -> Text:
    """Either plain text or a conversation."""
    return _conversation(value, column) if _is_conversation(value) else _string(value, column)


def _as_turn(text: Text, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def _is_empty(completion: Text) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    answers = [turn for turn in completion if turn["role"] == "assistant"]
    return not answers or any(not str(turn["content"]).strip() and not turn.get("tool_calls") for turn in answers[-1:])


def _without_tail(turns: tuple[Message, ...], note: Note) -> tuple[Message, ...]:
    """The turns up to the last one that the assistant wrote: what follows it is nobody's answer."""
    end = len(turns)
    while end and turns[end - 1]["role"] != "assistant":
        end -= 1
    if 0 < end < len(turns):
        note("turns after the last answer left out")
    return turns[:end]


def _ranked(
    prompt: Text, completions: Sequence[Text], note: Note, *, at_least: int, margin: float | None = None
) -> RankedCompletions:
    """Put a row together: one kind of text on both sides, no empty and no repeated completion."""
    if any(not isinstance(text, str) for text in (prompt, *completions)):
        prompt = _as_turn(prompt, "user")
        completions = [_without_tail(_as_turn(completion, "assistant"), note) for completion in completions]
    filled = [completion for completion in completions if not _is_empty(completion)]
    distinct = [completion for index, completion in enumerate(filled) if completion not in filled[:index]]
    if len(filled) < at_least:
        raise _Dropped("empty completion")
    if len(distinct) < at_least:
        raise _Dropped("identical sides")
    if len(distinct) < len(completions):
        note("empty or repeated completions of a ranked list left out")
    return RankedCompletions(prompt=prompt, completions=tuple(distinct), margin=margin)


# ------------------------------------------------------------------------------------------------------ HH strings

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_HH_LABEL = re.compile(r"\b(Human|Assistant):")


def _is_hh(value: Any) -> bool:
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None and "\n\nAssistant:" in value


def hh_conversation(text: str, note: Note = lambda _: None) -> tuple[Message, ...]:
    r"""An HH-RLHF dialogue in one string (``\n\nHuman: ...\n\nAssistant: ...``) as messages.

    A turn begins where a paragraph begins with its label; a label anywhere else is text. Two turns of one speaker in
    a row are one turn: in the collection they come from a label that was written into an answer. White space around
    a turn belongs to the string form, not to what was said.

    Raises ``DataError`` for text before the first label.
    """
    opening, *parts = _HH_TURN.split(text if text.startswith("\n\n") else text.lstrip())
    if opening.strip() or not parts:
        raise DataError(
            "an HH dialogue begins with 'Human:' or 'Assistant:'",
            way_out="choose another format with data_format, or mend the row",
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    turns: list[Message] = []
    for label, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = roles[label], content.strip()
        if turns and turns[-1]["role"] == role:
            note("turns of one speaker in a row joined")
            content = f"{turns.pop()['content']}\n\n{content}".strip()
        turns.append({"role": role, "content": content})
    if any(_HH_LABEL.search(str(turn["content"])) for turn in turns):
        note("'Human:' or 'Assistant:' inside a turn kept as text")
    return tuple(turns)


def split_at_turns(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Two whole conversations → (prompt, chosen completion, rejected completion), cut at a turn.

    The prompt is what both share up to and with the last human turn that both share; what follows it, shared or not,
    is completion. Only whole turns are compared: answers that begin with the same words keep them. The prompt is
    empty where no human turn is shared.
    """
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    cut = max((index + 1 for index in range(shared) if chosen[index]["role"] == "user"), default=0)
    return chosen[:cut], chosen[cut:], rejected[cut:]


# -------------------------------------------------------------------------------------------------------- formats


def _read_messages(fields: Fields, note: Note) -> RankedCompletions:
    """Everything from the first assistant turn that answers somebody on is completion."""
    column = _column(fields, CONVERSATION_COLUMNS)
    turns = _conversation(_need(fields, *CONVERSATION_COLUMNS), column or "messages")
    if fields.get("system") and (not turns or turns[0]["role"] != "system"):
        turns = ({"role": "system", "content": _string(fields["system"], "system")}, *turns)
    asked = next((index for index, turn in enumerate(turns) if turn["role"] not in {"system", "assistant"}), len(turns))
    start = next((index for index in range(asked, len(turns)) if turns[index]["role"] == "assistant"), len(turns))
    if start == len(turns):
        raise _Dropped("no assistant turn that answers one before it")
    if any(turn["role"] == "assistant" for turn in turns[:asked]):
        note("assistant turns before the first question made part of the prompt")
    return _ranked(turns[:start], [turns[start:]], note, at_least=1)


def _read_prompt_completion(fields: Fields, note: Note) -> RankedCompletions:
    prompt = _text(_need(fields, *PROMPT_COLUMNS), "prompt")
    completion = _text(_need(fields, *COMPLETION_COLUMNS), "completion")
    return _ranked(prompt, [completion], note, at_least=1)


def _read_text(fields: Fields, note: Note) -> RankedCompletions:
    return _ranked("", [_string(_need(fields, "text"), "text")], note, at_least=1)


def _read_alpaca(fields: Fields, note: Note) -> RankedCompletions:
    instruction = _string(_need(fields, "instruction"), "instruction")
    context = _string(fields.get("input") or "", "input")
    system = fields.get("system")
    turns: list[Message] = [{"role": "system", "content": _string(system, "system")}] if system else []
    turns.append({"role": "user", "content": f"{instruction}\n\n{context}" if context.strip() else instruction})
    return _ranked(tuple(turns), [_string(_need(fields, "output"), "output")], note, at_least=1)


def _margin(fields: Fields) -> float | None:
    """How much better the chosen side is: the ``margin`` column, or the difference of two score columns."""
    if fields.get("margin") not in (None, ""):
        return _number(fields["margin"], "margin")
    columns = [_column(fields, (f"score_{side}", f"{side}_score")) for side in ("chosen", "rejected")]
    if None in columns or any(fields[column] == "" for column in columns if column):
        return None
    chosen, rejected = (_number(fields[column], column) for column in columns if column)
    if chosen < rejected:
        raise _Dropped("the chosen side has the lower score")
    return chosen - rejected


def _read_explicit(fields: Fields, note: Note) -> RankedCompletions:
    prompt = _text(_need(fields, *PROMPT_COLUMNS), "prompt")
    sides = [_text(_need(fields, side), side) for side in ("chosen", "rejected")]
    return _ranked(prompt, sides, note, at_least=2, margin=_margin(fields))


def _read_hh_prompt(fields: Fields, note: Note) -> RankedCompletions:
    turns = hh_conversation(_string(_need(fields, "prompt"), "prompt"), note)
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns = turns[:-1]
    sides = [_string(_need(fields, side), side).strip() for side in ("chosen", "rejected")]
    return _ranked(turns, sides, note, at_least=2, margin=_margin(fields))


def _read_implicit(fields: Fields, note: Note) -> RankedCompletions:
    sides = [_conversation(_need(fields, side), side) for side in ("chosen", "rejected")]
    return _cut_pair(sides[0], sides[1], fields, note)


def _read_hh(fields: Fields, note: Note) -> RankedCompletions:
    sides = [hh_conversation(_string(_need(fields, side), side), note) for side in ("chosen", "rejected")]
    return _cut_pair(sides[0], sides[1], fields, note)


def _cut_pair(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], fields: Fields, note: Note
) -> RankedCompletions:
    prompt, *sides = split_at_turns(chosen, rejected)
    if not prompt:
        raise _Dropped("the sides share no human turn")
    return _ranked(prompt, sides, note, at_least=2, margin=_margin(fields))


def _read_ranked(fields: Fields, note: Note) -> RankedCompletions:
    """Best first as they stand, or sorted by ``scores`` (highest first) or ``ranks`` (1 is best).

    Of completions that tie only the first is kept: the likelihoods of rankings know no ties.
    """
    prompt = _text(_need(fields, *PROMPT_COLUMNS), "prompt")
    completions = [_text(item, "completions") for item in _list(_need(fields, "completions"), "completions")]
    column = _column(fields, ("scores", "ranks"))
    if column is None:
        return _ranked(prompt, completions, note, at_least=2)
    numbers = [_number(item, column) for item in _list(fields[column], column)]
    if len(numbers) != len(completions):
        raise DataError(f"{len(completions)} completions but {len(numbers)} {column}")
    goodness = [number if column == "scores" else -number for number in numbers]
    order = sorted(range(len(goodness)), key=lambda index: -goodness[index])
    untied = [i for place, i in enumerate(order) if place == 0 or goodness[i] != goodness[order[place - 1]]]
    if len(untied) < min(2, len(order)):
        raise _Dropped("all completions tie")
    if len(untied) < len(order):
        note("tied completions of a ranked list left out")
    kept = [completions[index] for index in untied]
    example = _ranked(prompt, kept, note, at_least=2)
    if column == "scores" and len(example.completions) == len(kept):
        return replace(example, margin=goodness[untied[0]] - goodness[untied[1]])
    return example


@dataclass(frozen=True, slots=True)
class DataFormat:
    """A shape of rows: the columns it shows itself by, and how one row becomes ranked completions."""

    task: Task
    columns: str
    """What a row looks like, for messages."""
    matches: Callable[[Fields], bool]
    read: Callable[[Fields, Note], RankedCompletions]


def _has(fields: Fields, *alternatives: Sequence[str]) -> bool:
    return all(_column(fields, names) for names in alternatives)


def _is_pair(fields: Fields) -> bool:
    return _has(fields, ["chosen"], ["rejected"])


def _is_whole(value: Any) -> bool:
    """Whether a conversation begins with somebody asking: then it holds the prompt."""
    if not _is_conversation(value):
        return False
    try:
        turns = _conversation(value, "")
    except DataError:
        return False
    return next((turn["role"] for turn in turns if turn["role"] != "system"), None) == "user"


def _matches_conversation(fields: Fields, key: str) -> bool:
    column = _column(fields, CONVERSATION_COLUMNS)
    if column is None or not _is_conversation(fields[column]):
        return False
    value = fields[column]
    first = (json.loads(value) if isinstance(value, str) else value)[0]
    return key in first


# In the order of trial: the more a row must have, the earlier.
FORMATS: dict[str, DataFormat] = {
    "ranked": DataFormat(
        "preference",
        "prompt, completions (best first, or with scores or ranks)",
        lambda fields: _has(fields, PROMPT_COLUMNS, ["completions"]),
        _read_ranked,
    ),
    "hh": DataFormat(
        "preference",
        "chosen, rejected (whole dialogues in one string, Human: / Assistant:)",
        lambda fields: _is_pair(fields) and _is_hh(fields["chosen"]) and _is_hh(fields["rejected"]),
        _read_hh,
    ),
    "hh_prompt": DataFormat(
        "preference",
        "prompt (a dialogue in one string, Human: / Assistant:), chosen, rejected",
        lambda fields: _is_pair(fields) and _is_hh(fields.get("prompt")) and isinstance(fields["chosen"], str),
        _read_hh_prompt,
    ),
    "implicit": DataFormat(
        "preference",
        "chosen, rejected (whole conversations as message lists)",
        lambda fields: _is_pair(fields) and _is_whole(fields["chosen"]) and _is_whole(fields["rejected"]),
        _read_implicit,
    ),
    "explicit": DataFormat(
        "preference",
        "prompt, chosen, rejected (strings or message lists)",
        lambda fields: _is_pair(fields) and _has(fields, PROMPT_COLUMNS),
        _read_explicit,
    ),
    "messages": DataFormat(
        "sft",
        "messages (role, content)",
        lambda fields: _matches_conversation(fields, "role"),
        _read_messages,
    ),
    "sharegpt": DataFormat(
        "sft",
        "conversations (from, value)",
        lambda fields: _matches_conversation(fields, "from"),
        _read_messages,
    ),
    "prompt_completion": DataFormat(
        "sft",
        "prompt, completion (strings or message lists)",
        lambda fields: _has(fields, PROMPT_COLUMNS, COMPLETION_COLUMNS),
        _read_prompt_completion,
    ),
    "alpaca": DataFormat(
        "sft",
        "instruction, input, output",
        lambda fields: _has(fields, ["instruction"], ["output"]),
        _read_alpaca,
    ),
    "text": DataFormat("sft", "text", lambda fields: _has(fields, ["text"]), _read_text),
}


def detect_format(first_rows: Sequence[Row], task: Task | None) -> str:
    """The name of the format that the first rows have, by their columns and the types in them.

    For ``sft`` the formats of demonstrations are tried first, then those of preferences, whose best side is a
    demonstration; ``None`` tries all. Raises ``DataError`` where no format fits or the rows disagree.
    """
    names = [name for name, each in FORMATS.items() if task != "preference" or each.task == task]
    if task == "sft":
        names.sort(key=lambda name: FORMATS[name].task != "sft")
    found: dict[str | None, Row] = {}
    for row in first_rows:
        found.setdefault(next((name for name in names if FORMATS[name].matches(row.fields)), None), row)
    wanted = "\n".join(f"      {name:18} {FORMATS[name].columns}" for name in names)
    if not found:
        raise DataError("there are no rows")
    if None in found:
        row = found[None]
        columns = ", ".join(str(name) for name, value in row.fields.items() if value is not None) or "none"
        raise DataError(
            f"no known format has these columns and types: {columns}",
            where=row.where,
            way_out=f"rename the columns, or name the format with data_format. Known:\n{wanted}",
        )
    if len(found) > 1:
        first, second, *_ = found.items()
        raise DataError(
            f"looks like the format '{second[0]}', but {first[1].where} like '{first[0]}'",
            where=second[1].where,
            way_out="keep one format in a file, or name it with data_format",
        )
    return next(str(name) for name in found)


# ---------------------------------------------------------------------------------------------------------- report


@dataclass(slots=True, kw_only=True)
class ReadReport:
    """What became of the rows: counts, reasons and the first place of each. Filled while the rows are read."""

    format: str = ""
    detected: bool = False
    task: Task | None = None
    num_rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason → rows that were left out."""
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason → where the first of them is."""
    noted: dict[str, int] = field(default_factory=dict)
    """Rows that were kept, but changed or worth a look: what → how many."""
    first_noted: dict[str, str] = field(default_factory=dict)
    malformed: list[DataError] = field(default_factory=list)
    """Rows that can't be read at all; only filled by readers that go on after them."""
    num_completions_cut: int = 0
    """Completions cut at the length limit: their end token is missing and not trained."""
    num_prompts_cut: int = 0

    @property
    def num_kept(self) -> int:
        return self.num_rows - sum(self.dropped.values()) - len(self.malformed)

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first_dropped.setdefault(reason, where)

    def note(self, what: str, where: str) -> None:
        """Count a row that is kept, but changed."""
        self.noted[what] = self.noted.get(what, 0) + 1
        self.first_noted.setdefault(what, where)

    def summary(self) -> str:
        """All of it in one line."""
        parts = [f"format {self.format}{' (detected)' if self.detected else ''}, {self.num_rows:,} rows"]
        if self.task == "sft" and self.format in FORMATS and FORMATS[self.format].task == "preference":
            parts.append("the chosen side as demonstration")
        parts.append(f"{self.num_kept:,} kept")
        parts += [f"{n:,} dropped: {why} (first: {self.first_dropped[why]})" for why, n in self.dropped.items()]
        if self.malformed:
            parts.append(f"{len(self.malformed):,} malformed (first: {self.malformed[0].where})")
        if self.num_completions_cut:
            parts.append(f"{self.num_completions_cut:,} completions cut at the length limit")
        if self.num_prompts_cut:
            parts.append(f"{self.num_prompts_cut:,} prompts cut")
        return "; ".join(parts)


def read_examples(
    source: Source,
    *,
    task: Task | None,
    data_format: str = "auto",
    report: ReadReport,
    split: str | None = None,
    strict: bool = True,
) -> Iterator[RankedCompletions]:
    """Prompts with their ranked completions from any source, one at a time; ``report`` is filled on the way.

    ``data_format`` is a key of ``FORMATS`` or ``auto``. For ``task="sft"`` preference data give their best side. A row
    with nothing to learn from (identical sides, an empty completion) is dropped and counted. A malformed row raises
    ``DataError`` with its place; with ``strict=False`` it is collected in the report and reading goes on.
    """
    rows = scan_rows(source, split=split)
    if data_format == "auto":
        first = list(itertools.islice(rows, ROWS_TO_DETECT))
        rows = itertools.chain(first, rows)
        if strict:
            for row in first:
                if isinstance(row, DataError):
                    raise row
        try:
            data_format = detect_format([row for row in first if isinstance(row, Row)], task)
        except DataError as error:
            where = error.where or (str(source) if isinstance(source, str | Path) else None)
            raise DataError(error.what, where=where, way_out=error.way_out) from None
        report.detected = True
    elif data_format not in FORMATS or (task == "preference" and FORMATS[data_format].task != task):
        names = ", ".join(name for name, each in FORMATS.items() if task != "preference" or each.task == task)
        raise DataError(f"{data_format!r} is no format of {task or 'any'} data", way_out=f"choose one of auto, {names}")
    report.format, report.task = data_format, task
    for row in rows:
        report.num_rows += 1
        example = row if isinstance(row, DataError) else _read(row, FORMATS[data_format], task, report)
        if isinstance(example, RankedCompletions):
            yield example
        elif isinstance(example, DataError):
            if strict:
                raise example
            report.malformed.append(example)


def _read(row: Row, data_format: DataFormat, task: Task | None, report: ReadReport) -> RankedCompletions | DataError | None:
    seen: list[str] = []
    try:
        example = replace(data_format.read(row.fields, seen.append), where=row.where)
    except _Dropped as reason:
        report.drop(str(reason), row.where)
        return None
    except DataError as error:
        way_out = error.way_out or f"the format '{report.format}' wants {data_format.columns}"
        return DataError(error.what, where=row.where, way_out=way_out)
    for what in dict.fromkeys(seen):
        report.note(what, row.where)
    return replace(example, completions=example.completions[:1], margin=None) if task == "sft" else example
