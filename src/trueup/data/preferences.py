"""Formats of preferences: pairs, ranked lists, and single completions that are labelled good or bad."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trueup.data.cells import (
    PROMPT_COLUMNS,
    conversation,
    first_of,
    has,
    is_conversation,
    list_of,
    need,
    number,
    prompt_in,
    string_in,
    text_of,
    truth,
)
from trueup.data.data_format import DataFormat, Dropped, Note, ranked
from trueup.data.demonstrations import LABEL_COLUMN, is_labelled, read_prompt_completion
from trueup.data.dialogues import hh_conversation, is_hh, split_at_turns
from trueup.data.rows import Fields
from trueup.data.sampled import is_sampled
from trueup.data.stepwise import is_stepwise
from trueup.errors import DataError
from trueup.records import Message, RankedCompletions


def _is_pair(fields: Fields) -> bool:
    return has(fields, ["chosen"], ["rejected"])


def is_hh_prompt(fields: Fields) -> bool:
    return _is_pair(fields) and is_hh(fields.get("prompt")) and isinstance(fields["chosen"], str)


def is_whole(value: Any) -> bool:
    """Whether a conversation begins with somebody asking: then it holds the prompt."""
    if not is_conversation(value):
        return False
    try:
        turns = conversation(value, "")
    except DataError:
        return False
    return next((turn["role"] for turn in turns if turn["role"] != "system"), None) == "user"


def _read_unpaired(fields: Fields, note: Note) -> RankedCompletions:
    example = read_prompt_completion(fields, note)
    return replace(example, desirable=(truth(need(fields, LABEL_COLUMN), LABEL_COLUMN),))


def _margin(fields: Fields) -> float | None:
    """How much better the chosen side is: the ``margin`` column, or the difference of two score columns."""
    if fields.get("margin") not in (None, ""):
        return number(fields["margin"], "margin")
    columns = [first_of(fields, (f"score_{side}", f"{side}_score")) for side in ("chosen", "rejected")]
    if None in columns or any(fields[column] == "" for column in columns if column):
        return None
    chosen, rejected = (number(fields[column], column) for column in columns if column)
    if chosen < rejected:
        raise Dropped("the chosen side has the lower score")
    return chosen - rejected


def _read_explicit(fields: Fields, note: Note) -> RankedCompletions:
    prompt = prompt_in(fields)
    sides = [text_of(need(fields, side), side) for side in ("chosen", "rejected")]
    return ranked(prompt, sides, note, at_least=2, margin=_margin(fields))


def hh_prompt_in(fields: Fields, note: Note) -> tuple[Message, ...]:
    """A dialogue in one string. The label behind which the answer is to come is none of its turns."""
    turns = hh_conversation(string_in(fields, "prompt"), note)
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def _read_hh_prompt(fields: Fields, note: Note) -> RankedCompletions:
    turns = hh_prompt_in(fields, note)
    sides = [string_in(fields, side).strip() for side in ("chosen", "rejected")]
    return ranked(turns, sides, note, at_least=2, margin=_margin(fields))


def _read_implicit(fields: Fields, note: Note) -> RankedCompletions:
    sides = [conversation(need(fields, side), side) for side in ("chosen", "rejected")]
    return _cut_pair(sides[0], sides[1], fields, note)


def _read_hh(fields: Fields, note: Note) -> RankedCompletions:
    sides = [hh_conversation(string_in(fields, side), note) for side in ("chosen", "rejected")]
    return _cut_pair(sides[0], sides[1], fields, note)


def _cut_pair(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], fields: Fields, note: Note
) -> RankedCompletions:
    prompt, *sides = split_at_turns(chosen, rejected)
    if not prompt:
        raise Dropped("the sides share no human turn")
    return ranked(prompt, sides, note, at_least=2, margin=_margin(fields))


def _read_ranked(fields: Fields, note: Note) -> RankedCompletions:
    """Best first as they stand, or sorted by ``scores`` (highest first) or ``ranks`` (1 is best).

    Of completions that tie only the first is kept: the likelihoods of rankings know no ties.
    """
    prompt = prompt_in(fields)
    completions = [text_of(item, "completions") for item in list_of(need(fields, "completions"), "completions")]
    if len(completions) < 2:
        raise Dropped("fewer than two completions")
    column = first_of(fields, ("scores", "ranks"))
    if column is None:
        return ranked(prompt, completions, note, at_least=2)
    numbers = [number(item, column) for item in list_of(fields[column], column)]
    if len(numbers) != len(completions):
        raise DataError(f"{len(completions)} completions but {len(numbers)} {column}")
    goodness = [each if column == "scores" else -each for each in numbers]
    order = sorted(range(len(goodness)), key=lambda index: -goodness[index])
    untied = [i for place, i in enumerate(order) if place == 0 or goodness[i] != goodness[order[place - 1]]]
    if len(untied) < min(2, len(order)):
        raise Dropped("all completions tie")
    if len(untied) < len(order):
        note("tied completions of a ranked list left out")
    kept = [completions[index] for index in untied]
    example = ranked(prompt, kept, note, at_least=2)
    if column == "scores" and len(example.completions) == len(kept):
        return replace(example, margin=goodness[untied[0]] - goodness[untied[1]])
    return example


PREFERENCES: dict[str, DataFormat] = {
    "ranked": DataFormat(
        "preference",
        "prompt, completions (best first, or with scores or ranks)",
        lambda fields: has(fields, PROMPT_COLUMNS, ["completions"]) and not (is_stepwise(fields) or is_sampled(fields)),
        _read_ranked,
    ),
    "hh": DataFormat(
        "preference",
        "chosen, rejected (whole dialogues in one string, Human: / Assistant:)",
        lambda fields: _is_pair(fields) and is_hh(fields["chosen"]) and is_hh(fields["rejected"]),
        _read_hh,
    ),
    "hh_prompt": DataFormat(
        "preference",
        "prompt (a dialogue in one string, Human: / Assistant:), chosen, rejected",
        is_hh_prompt,
        _read_hh_prompt,
    ),
    "implicit": DataFormat(
        "preference",
        "chosen, rejected (whole conversations as message lists)",
        lambda fields: _is_pair(fields) and is_whole(fields["chosen"]) and is_whole(fields["rejected"]),
        _read_implicit,
    ),
    "explicit": DataFormat(
        "preference",
        "prompt, chosen, rejected (strings or message lists)",
        lambda fields: _is_pair(fields) and has(fields, PROMPT_COLUMNS),
        _read_explicit,
    ),
    "unpaired": DataFormat(
        "preference",
        "prompt, completion, label (true: desirable, false: not)",
        is_labelled,
        _read_unpaired,
    ),
}
