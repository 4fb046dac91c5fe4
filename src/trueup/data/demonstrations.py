"""Formats of demonstrations: one completion to a prompt."""

from __future__ import annotations

from collections.abc import Mapping

from trueup.data.cells import (
    COMPLETION_COLUMNS,
    CONVERSATION_COLUMNS,
    PROMPT_COLUMNS,
    conversation,
    first_of,
    has,
    is_conversation,
    is_truth,
    list_of,
    need,
    prompt_in,
    string,
    string_in,
    text_of,
)
from trueup.data.data_format import DataFormat, Dropped, Note, ranked
from trueup.data.rows import Fields
from trueup.records import Message, RankedCompletions

LABEL_COLUMN = "label"


def is_labelled(fields: Fields) -> bool:
    return has(fields, PROMPT_COLUMNS, COMPLETION_COLUMNS, [LABEL_COLUMN]) and is_truth(fields[LABEL_COLUMN])


def _matches_conversation(fields: Fields, key: str) -> bool:
    column = first_of(fields, CONVERSATION_COLUMNS)
    if column is None or isinstance(fields[column], Mapping) or not is_conversation(fields[column]):
        return False
    return key in list_of(fields[column], column)[0]


def turns_in(fields: Fields) -> tuple[Message, ...]:
    """The turns of a whole conversation, behind the system prompt where one stands in a column of its own."""
    column = first_of(fields, CONVERSATION_COLUMNS)
    turns = conversation(need(fields, *CONVERSATION_COLUMNS), column or "messages")
    if fields.get("system") and (not turns or turns[0]["role"] != "system"):
        turns = ({"role": "system", "content": string(fields["system"], "system")}, *turns)
    return turns


def _read_messages(fields: Fields, note: Note) -> RankedCompletions:
    """Everything from the first assistant turn that answers somebody on is completion."""
    turns = turns_in(fields)
    asked = next((index for index, turn in enumerate(turns) if turn["role"] not in {"system", "assistant"}), len(turns))
    start = next((index for index in range(asked, len(turns)) if turns[index]["role"] == "assistant"), len(turns))
    if start == len(turns):
        raise Dropped("no assistant turn that answers one before it")
    if any(turn["role"] == "assistant" for turn in turns[:asked]):
        note("assistant turns before the first question made part of the prompt")
    return ranked(turns[:start], [turns[start:]], note, at_least=1)


def read_prompt_completion(fields: Fields, note: Note) -> RankedCompletions:
    prompt = prompt_in(fields)
    completion = text_of(need(fields, *COMPLETION_COLUMNS), "completion")
    return ranked(prompt, [completion], note, at_least=1)


def _read_text(fields: Fields, note: Note) -> RankedCompletions:
    return ranked("", [string_in(fields, "text")], note, at_least=1)


def instruction_in(fields: Fields) -> tuple[Message, ...]:
    """An instruction and what it is about, as a user's turn."""
    instruction = string_in(fields, "instruction")
    context = string(fields.get("input") or "", "input")
    system = fields.get("system")
    turns: list[Message] = [{"role": "system", "content": string(system, "system")}] if system else []
    turns.append({"role": "user", "content": f"{instruction}\n\n{context}" if context.strip() else instruction})
    return tuple(turns)


def _read_alpaca(fields: Fields, note: Note) -> RankedCompletions:
    return ranked(instruction_in(fields), [string_in(fields, "output")], note, at_least=1)


DEMONSTRATIONS: dict[str, DataFormat] = {
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
        lambda fields: has(fields, PROMPT_COLUMNS, COMPLETION_COLUMNS) and not is_labelled(fields),
        read_prompt_completion,
    ),
    "alpaca": DataFormat(
        "sft",
        "instruction, input, output",
        lambda fields: has(fields, ["instruction"], ["output"]),
        _read_alpaca,
    ),
    "text": DataFormat("sft", "text", lambda fields: has(fields, ["text"]), _read_text),
}
