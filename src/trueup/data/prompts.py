"""Prompts alone: what online learning and sampling read, with the columns that rewards look at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trueup.data.cells import CONVERSATION_COLUMNS, PROMPT_COLUMNS, columns, conversation, first_of, has, prompt_in
from trueup.data.data_format import DataFormat, Dropped, Note
from trueup.data.demonstrations import instruction_in, turns_in
from trueup.data.dialogues import hh_conversation, is_hh, split_at_turns
from trueup.data.preferences import hh_prompt_in, is_hh_prompt, is_whole
from trueup.data.report import ReadReport, read_all
from trueup.data.rows import Fields, Row, Source, scan_rows
from trueup.data.sampled import plain_json
from trueup.errors import DataError
from trueup.records import Message, RankedCompletions, Text

WANTED = "a prompt (text or a list of messages) stands in 'prompt', or is what 'messages' or 'chosen' begin with"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """One prompt, and the row's other columns as they stand: what a reward compares an answer with."""

    prompt: Text
    columns: Mapping[str, Any]
    where: str = ""


class Request(NamedTuple):
    """One prompt to be answered: its number, which keys the random streams of its completions; its row; its tokens,
    int64 [P]."""

    number: int
    row: PromptRow
    tokens: np.ndarray


def requests_fingerprint(requests: Sequence[Request]) -> str:
    """Changes with the order of the requests, their numbers, tokens and columns; not with the name of their file."""
    digest = hashlib.blake2b(digest_size=16)
    for request in requests:
        row = [request.number, plain_json(request.row.prompt), plain_json(request.row.columns)]
        digest.update(json.dumps(row).encode())
        digest.update(request.tokens.astype(np.int64).tobytes())
    return digest.hexdigest()


def read_prompts(
    source: Source, *, report: ReadReport, split: str | None = None, strict: bool = True
) -> Iterator[PromptRow]:
    """The prompts of any source, one at a time; ``report`` is filled on the way.

    A row's prompt is its column ``prompt`` (or ``question``); where it has none, what its whole conversation
    (``messages``) says before the last answer, what its ``chosen`` and ``rejected`` conversations share, or its
    ``instruction`` with ``input``. Every other column is kept. Each row is looked at by itself: kinds may be mixed.

    Raises ``DataError`` for a source that can't be read and for a row without a prompt; with ``strict=False`` such rows
    are collected in the report and reading goes on.
    """
    report.format = "prompt"
    return read_all(scan_rows(source, split=split), _read, report, wanted=WANTED, strict=strict)


def _read(row: Row, note: Note) -> PromptRow:
    prompt = prompt_of(row.fields, note)
    taken = first_of(row.fields, (*PROMPT_COLUMNS, *CONVERSATION_COLUMNS))
    others = {str(name): value for name, value in row.fields.items() if name != taken}
    return PromptRow(prompt=prompt, columns=others, where=row.where)


def prompt_of(fields: Fields, note: Note) -> Text:
    """The prompt of a row, as training on the same row would see it.

    Raises ``DataError`` where the row has none, ``Dropped`` where its conversation asks nothing.
    """
    if is_hh_prompt(fields):
        return hh_prompt_in(fields, note)
    if has(fields, PROMPT_COLUMNS):
        return prompt_in(fields)
    if has(fields, CONVERSATION_COLUMNS):
        return _asked(turns_in(fields))
    if all(is_hh(fields.get(side)) for side in ("chosen", "rejected")):
        return _shared(*(hh_conversation(fields[side], note) for side in ("chosen", "rejected")))
    if all(is_whole(fields.get(side)) for side in ("chosen", "rejected")):
        return _shared(*(conversation(fields[side], side) for side in ("chosen", "rejected")))
    if has(fields, ["instruction"]):
        return instruction_in(fields)
    raise DataError(f"no prompt in these columns: {columns(fields)}")


def _asked(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """A conversation up to its last answer; all of it where it ends with a question."""
    asked = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    if all(turn["role"] in {"system", "assistant"} for turn in asked):
        raise Dropped("no turn that asks for an answer")
    return asked


def _shared(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    prompt, _, _ = split_at_turns(chosen, rejected)
    if not prompt:
        raise Dropped("the sides share no human turn")
    return prompt


PROMPTS: dict[str, DataFormat] = {
    "prompt": DataFormat(
        "prompt",
        "prompt (a string or a message list), and what rewards look at",
        lambda fields: has(fields, PROMPT_COLUMNS) and not fields.keys() & {"chosen", "rejected"},
        lambda fields, note: RankedCompletions(prompt=prompt_of(fields, note), completions=()),
    ),
}
