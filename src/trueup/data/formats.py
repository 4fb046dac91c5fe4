"""Formats: what the columns of a row mean. Every one turns a row into a prompt with its completions, the best first.

A ``DataFormat`` knows its columns and how to read one row. What can't be read raises ``DataError`` with the place; what
can be read but teaches nothing is dropped and counted in the ``ReadReport``.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trueup.data.rows import Fields, Row, Source, read_rows, scan_rows
from trueup.errors import DataError
from trueup.records import Message, RankedCompletions, Text

__all__ = [
    "FORMATS",
    "DataFormat",
    "ReadReport",
    "Row",
    "Source",
    "Task",
    "detect_format",
    "hh_conversation",
    "read_examples",
    "read_rows",
    "split_at_turns",
]

Task = Literal["sft", "preference", "process"]
Note = Callable[[str], None]

ROWS_TO_DETECT = 32
"""How many rows the format is judged by."""

# ------------------------------------------------------------------------------------------------- parts of a row


class _Dropped(Exception):
    """The row can be read, but there is nothing to learn from it. Its message is the reason that gets counted."""


ROLE_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}
"""Names of roles in the wild → the names that chat templates know."""

PROMPT_COLUMNS = ("prompt", "question")
COMPLETION_COLUMNS = ("completion", "response", "answer")
LABEL_COLUMN = "label"
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")


def _column(fields: Fields, names: Sequence[str]) -> str | None:
    """The first of ``names`` that the row has a value for."""
    return next((name for name in names if fields.get(name) is not None), None)


def _need(fields: Fields, *names: str) -> Any:
    name = _column(fields, names)
    if name is None:
        raise DataError(
            f"the column {' or '.join(map(repr, names))} is missing or empty (columns here: {_columns(fields)})",
            way_out="complete the row, or tell the format with data_format",
        )
    return fields[name]


def _columns(fields: Fields) -> str:
    """The names of the columns that hold something, quoted: they may hold anything themselves."""
    return ", ".join(repr(str(name)) for name, value in fields.items() if value is not None) or "none"


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


_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def _is_truth(value: Any) -> bool:
    """Whether a cell says true or false: a boolean, 0 or 1, or one of these as a CSV file has them."""
    return str(_from_array(value)).lower() in _TRUTHS


def _truth(value: Any, column: str) -> bool:
    if not _is_truth(value):
        raise DataError(f"{column!r} must be true or false, found {value!r:.40}")
    return _TRUTHS[str(_from_array(value)).lower()]


def _list(value: Any, column: str) -> list[Any]:
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


def _is_conversation(value: Any) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    value = _from_array(value)
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
    return {"role": ROLE_NAMES.get(role, role), "content": _string(content or "", f"{column}.content"), **message}


def _check_strings(value: Any, column: str) -> None:
    """Raise ``DataError`` if a string anywhere in what else a message holds can't be encoded."""
    if isinstance(value, str):
        _string(value, column)
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


def _read_unpaired(fields: Fields, note: Note) -> RankedCompletions:
    example = _read_prompt_completion(fields, note)
    return replace(example, desirable=(_truth(_need(fields, LABEL_COLUMN), LABEL_COLUMN),))


STEP_COLUMNS = ("steps", "completions")
RATINGS = {1.0: 1.0, 0.0: 1.0, -1.0: 0.0}
"""What people called a step, good, neutral or bad → how right it is: a neutral step is no mistake."""


def _read_stepwise(fields: Fields, note: Note) -> RankedCompletions:
    """Labels are true, false, or a share of right in [0, 1]; ratings are 1, 0 (neutral) or -1; null is not labelled.

    They are two columns because a 0 means two things.
    """
    prompt = _text(_need(fields, *PROMPT_COLUMNS), "prompt")
    column = _column(fields, STEP_COLUMNS) or "steps"
    steps = [_string(step, f"{column}[{index}]") for index, step in enumerate(_list(_need(fields, column), column))]
    column = _column(fields, ("labels", "ratings")) or "labels"
    read = _rating if column == "ratings" else _label
    labels = [
        None if label is None else read(label, f"{column}[{index}]")
        for index, label in enumerate(_list(_need(fields, "labels", "ratings"), column))
    ]
    return _stepwise(prompt, steps, labels)


def _label(value: Any, column: str) -> float:
    label = float(value) if isinstance(value, bool) else _number(value, column)
    if not 0 <= label <= 1:
        raise DataError(
            f"{column!r} must lie between 0 and 1, found {value!r:.40}",
            way_out="ratings of 1, 0 (neutral) and -1 go into a column 'ratings'",
        )
    return label


def _rating(value: Any, column: str) -> float:
    rating = _number(value, column)
    if rating not in RATINGS:
        raise DataError(f"{column!r} must be 1, 0 (neutral) or -1, found {value!r:.40}")
    return RATINGS[rating]


def _stepwise(prompt: Text, steps: Sequence[str], labels: Sequence[float | None]) -> RankedCompletions:
    if len(labels) != len(steps):
        raise DataError(f"{len(steps)} steps but {len(labels)} labels", way_out="label each step; null where not known")
    for number, step in enumerate(steps, 1):
        if not step.strip():
            raise DataError(f"step {number} is empty", way_out="remove it, and its label")
    if not steps:
        raise _Dropped("no steps")
    if all(label is None for label in labels):
        raise _Dropped("no step is labelled")
    text = "\n".join(steps)
    return RankedCompletions(
        prompt=prompt,
        completions=(text if isinstance(prompt, str) else _as_turn(text, "assistant"),),
        steps=(tuple(steps),),
        step_labels=(tuple(labels),),
    )


_SHEPHERD_MARK, _SHEPHERD_START = "ки", "Step 1:"


def _read_math_shepherd(fields: Fields, note: Note) -> RankedCompletions:
    """The same text twice: with a mark behind each step in ``input``, with + or - in its place in ``label``."""
    marked, judged = (_string(_need(fields, column), column) for column in ("input", "label"))
    *parts, tail = marked.split(_SHEPHERD_MARK)
    signs = re.fullmatch("([+-])".join(map(re.escape, (*parts, tail))), judged)
    if not parts or signs is None:
        raise DataError(f"'label' is not 'input' with + or - in place of every {_SHEPHERD_MARK}")
    question, start, opening = parts[0].partition(_SHEPHERD_START)
    if not start:
        raise DataError(f"'input' has no {_SHEPHERD_START!r}, so the question's end is not known")
    if tail.strip():
        note("text behind the last labelled step left out")
    steps = [step.strip() for step in (start + opening, *parts[1:])]
    return _stepwise(f"{question.strip()}\n", steps, [float(sign == "+") for sign in signs.groups()])


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
    if len(completions) < 2:
        raise _Dropped("fewer than two completions")
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


def _is_labelled(fields: Fields) -> bool:
    return _has(fields, PROMPT_COLUMNS, COMPLETION_COLUMNS, [LABEL_COLUMN]) and _is_truth(fields[LABEL_COLUMN])


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
    if column is None or isinstance(fields[column], Mapping) or not _is_conversation(fields[column]):
        return False
    return key in _list(fields[column], column)[0]


def _is_stepwise(fields: Fields) -> bool:
    return _has(fields, PROMPT_COLUMNS, ["steps"]) or _has(fields, PROMPT_COLUMNS, ["completions"], ["labels"])


def _is_math_shepherd(fields: Fields) -> bool:
    return _has(fields, ["input"], ["label"]) and _SHEPHERD_MARK in str(fields["input"])


# In the order of trial: the more a row must have, the earlier.
FORMATS: dict[str, DataFormat] = {
    "stepwise": DataFormat(
        "process",
        "prompt, steps (or completions), labels (true or false, or 0 to 1) or ratings (1, 0, -1), one per step",
        _is_stepwise,
        _read_stepwise,
    ),
    "math_shepherd": DataFormat(
        "process",
        f"input (question and steps, {_SHEPHERD_MARK} behind each step), label (the same, + or - in its place)",
        _is_math_shepherd,
        _read_math_shepherd,
    ),
    "ranked": DataFormat(
        "preference",
        "prompt, completions (best first, or with scores or ranks)",
        lambda fields: _has(fields, PROMPT_COLUMNS, ["completions"]) and not _is_stepwise(fields),
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
    "unpaired": DataFormat(
        "preference",
        "prompt, completion, label (true: desirable, false: not)",
        _is_labelled,
        _read_unpaired,
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
        lambda fields: _has(fields, PROMPT_COLUMNS, COMPLETION_COLUMNS) and not _is_labelled(fields),
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

TASKS: dict[Task | None, tuple[Task, ...]] = {
    "sft": ("sft", "preference"),
    "preference": ("preference",),
    "process": ("process",),
    None: ("process", "preference", "sft"),
}
"""Whose formats a task reads, in the order of trial. The best side of a preference is a demonstration."""

COMMANDS: dict[Task, str] = {
    "sft": "trueup sft",
    "preference": "trueup reward or trueup preference",
    "process": "trueup reward --process",
}
"""What trains on a task's data."""


def format_names(task: Task | None) -> list[str]:
    """The formats that a task reads, in the order of trial; None reads all."""
    return [name for kind in TASKS[task] for name, each in FORMATS.items() if each.task == kind]


def detect_format(first_rows: Sequence[Row], task: Task | None) -> str:
    """The name of the format that the first rows have, by their columns and the types in them.

    For ``sft`` the formats of demonstrations are tried first, then those of preferences, whose best side is a
    demonstration; ``None`` tries all. Raises ``DataError`` where no format fits or the rows disagree.
    """
    names = format_names(task)
    found: dict[str | None, Row] = {}
    for row in first_rows:
        found.setdefault(next((name for name in names if FORMATS[name].matches(row.fields)), None), row)
    wanted = "\n".join(f"      {name:18} {FORMATS[name].columns}" for name in names)
    if not found:
        raise DataError("there are no rows")
    if None in found:
        row = found[None]
        other = next((name for name in FORMATS if FORMATS[name].matches(row.fields)), None)
        if other:
            raise DataError(
                f"these are rows of the format '{other}', not {task} data",
                where=row.where,
                way_out=f"train on them with {COMMANDS[FORMATS[other].task]}, or name the format with data_format",
            )
        raise DataError(
            f"no known format has these columns and types: {_columns(row.fields)}",
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
            parts.append(f"the {'desirable' if self.format == 'unpaired' else 'chosen'} side as demonstration")
        parts.append(f"{self.num_kept:,} kept")
        parts += [f"{n:,} dropped: {why} (first: {self.first_dropped[why]})" for why, n in self.dropped.items()]
        if self.malformed:
            parts.append(f"{len(self.malformed):,} malformed (first: {self.malformed[0].where})")
        if self.num_completions_cut:
            parts.append(f"completions cut at the length limit: {self.num_completions_cut:,}")
        if self.num_prompts_cut:
            parts.append(f"prompts cut: {self.num_prompts_cut:,}")
        return "; ".join(parts)


def source_name(source: Source) -> str | None:
    """What to call a source in messages, where it has a name."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, Sequence) and source and all(isinstance(item, str | Path) for item in source):
        return ", ".join(map(str, source))
    return None


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
        readable = [row for row in first if isinstance(row, Row)]
        broken = [row for row in first if isinstance(row, DataError)]
        if broken and (strict or not readable):
            raise broken[0]
        try:
            data_format = detect_format(readable, task)
        except DataError as error:
            where = error.where or source_name(source)
            raise DataError(error.what, where=where, way_out=error.way_out) from None
        report.detected = True
    elif data_format not in format_names(task):
        names = ", ".join(format_names(task))
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


def _read(
    row: Row, data_format: DataFormat, task: Task | None, report: ReadReport
) -> RankedCompletions | DataError | None:
    seen: list[str] = []
    try:
        example = replace(data_format.read(row.fields, seen.append), where=row.where)
    except _Dropped as reason:
        report.drop(str(reason), row.where)
        return None
    except RecursionError:
        return DataError("nested too deeply", where=row.where, way_out="flatten or remove the row")
    except DataError as error:
        way_out = error.way_out or f"the format '{report.format}' wants {data_format.columns}"
        return DataError(error.what, where=row.where, way_out=way_out)
    if task == "sft" and example.desirable == (False,):
        report.drop("undesirable completion", row.where)
        return None
    for what in dict.fromkeys(seen):
        report.note(what, row.where)
    if task == "sft":
        return replace(example, completions=example.completions[:1], margin=None, desirable=None)
    return example
