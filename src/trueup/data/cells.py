"""What the cells of a row hold: text, numbers, truths, lists, conversations. All else is a ``DataError``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trueup.data.rows import Fields
from trueup.errors import DataError
from trueup.records import Message, Text

ROLE_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}
"""Names of roles in the wild → the names that chat templates know."""

PROMPT_COLUMNS = ("prompt", "question")
COMPLETION_COLUMNS = ("completion", "response", "answer")
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")


def first_of(fields: Fields, names: Sequence[str]) -> str | None:
    """The first of ``names`` that the row has a value for."""
    return next((name for name in names if fields.get(name) is not None), None)


def has(fields: Fields, *alternatives: Sequence[str]) -> bool:
    """Whether the row has a value for one of each ``alternatives``."""
    return all(first_of(fields, names) for names in alternatives)


def need(fields: Fields, *names: str) -> Any:
    """The value of the first of ``names`` that has one. Raises ``DataError`` where none has."""
    name = first_of(fields, names)
    if name is None:
        raise DataError(
            f"the column {' or '.join(map(repr, names))} is missing or empty (columns here: {columns(fields)})",
            way_out="complete the row, or tell the format with data_format",
        )
    return fields[name]


def columns(fields: Fields) -> str:
    """The names of the columns that hold something, quoted: they may hold anything themselves."""
    return ", ".join(repr(str(name)) for name, value in fields.items() if value is not None) or "none"


def string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{column!r} must be a string, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{column!r} holds half of a surrogate pair (character {error.start})", way_out="mend the text's encoding"
        ) from None
    return value


def number(value: Any, column: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{column!r} must be a number, found {value!r:.40}") from None
    if isinstance(value, bool) or not math.isfinite(found):
        raise DataError(f"{column!r} must be a finite number, found {value!r:.40}")
    return found


_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def is_truth(value: Any) -> bool:
    """Whether a cell says true or false: a boolean, 0 or 1, or one of these as a CSV file has them."""
    return str(_from_array(value)).lower() in _TRUTHS


def truth(value: Any, column: str) -> bool:
    if not is_truth(value):
        raise DataError(f"{column!r} must be true or false, found {value!r:.40}")
    return _TRUTHS[str(_from_array(value)).lower()]


def list_of(value: Any, column: str) -> list[Any]:
    """A list; also from an array, and from a cell that holds JSON, since CSV has no lists."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    items = _from_array(value)
    if not isinstance(items, list | tuple):
        raise DataError(f"{column!r} must be a list, found {type(items).__name__}")
    return list(items)


def _from_array(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def is_conversation(value: Any) -> bool:
    """Whether a cell holds messages, or JSON of such."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    value = _from_array(value)
    return _is_message(value) or (isinstance(value, list | tuple) and bool(value) and all(map(_is_message, value)))


def conversation(value: Any, column: str) -> tuple[Message, ...]:
    """A list of messages (or one message), with template role names and string contents."""
    records = [value] if isinstance(value, Mapping) else list_of(value, column)
    return tuple(_message(record, f"{column}[{index}]") for index, record in enumerate(records))


def _message(record: Any, column: str) -> Message:
    if not _is_message(record):
        raise DataError(
            f"{column} is not a message", way_out='a message looks like {"role": "user", "content": "Hello"}'
        )
    # Parquet fills the keys that other rows have with null.
    message = {key: value for key, value in record.items() if value is not None}
    role = string(message.pop("role", message.pop("from", None)), f"{column}.role")
    message.pop("from", None)
    if not re.fullmatch(r"[\w.-]+", role):
        raise DataError(
            f"{column}.role is {role!r:.40}, which is no role", way_out="use system, user, assistant or tool"
        )
    content = message.pop("content", message.pop("value", None))
    message.pop("value", None)
    if isinstance(content, list | tuple):
        content = _joined_parts(content, f"{column}.content")
    if content is None and not message.get("tool_calls"):
        raise DataError(f"{column} has no content")
    _check_strings(message, column)
    return {"role": ROLE_NAMES.get(role, role), "content": string(content or "", f"{column}.content"), **message}


def _check_strings(value: Any, column: str) -> None:
    """Raise ``DataError`` if a string anywhere in what else a message holds can't be encoded."""
    if isinstance(value, str):
        string(value, column)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_strings(key, column)
            _check_strings(item, column)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_strings(item, column)


def _joined_parts(parts: Sequence[Any], column: str) -> str:
    """Content given as typed parts: the texts of text parts, joined. Pictures and sounds can't be read."""
    if not all(isinstance(part, Mapping) and part.get("type") == "text" and "text" in part for part in parts):
        raise DataError(f"{column} holds parts that are not text", way_out="only text can be trained on")
    return "".join(string(part["text"], column) for part in parts)


def text_of(value: Any, column: str) -> Text:
    """Either plain text or a conversation."""
    return conversation(value, column) if is_conversation(value) else string(value, column)


def string_in(fields: Fields, column: str) -> str:
    """The plain text of a column that must be there."""
    return string(need(fields, column), column)


def prompt_in(fields: Fields) -> Text:
    """The prompt, under one of its names."""
    return text_of(need(fields, *PROMPT_COLUMNS), "prompt")


def as_turns(text: Text | Iterable[Message], role: str) -> tuple[Message, ...]:
    """A conversation; plain text is one turn of ``role``."""
    return ({"role": role, "content": text},) if isinstance(text, str) else tuple(text)
