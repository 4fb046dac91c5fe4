"""What a format is: it knows its columns, and how a row becomes a prompt with its completions, the best first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from trueup.data.cells import as_turns
from trueup.data.rows import Fields
from trueup.records import Message, RankedCompletions, Text

Task = Literal["sft", "preference", "process", "prompt", "sampled"]
Note = Callable[[str], None]


class Dropped(Exception):
    """The row can be read, but there is nothing to learn from it. Its message is the reason that gets counted."""


@dataclass(frozen=True, slots=True)
class DataFormat:
    """A shape of rows: the columns it shows itself by, and how one row becomes ranked completions."""

    task: Task
    columns: str
    """What a row looks like, for messages."""
    matches: Callable[[Fields], bool]
    read: Callable[[Fields, Note], RankedCompletions]


def is_empty(completion: Text) -> bool:
    """Whether a completion says nothing: no text, or no last answer."""
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


def ranked(
    prompt: Text, completions: Sequence[Text], note: Note, *, at_least: int, margin: float | None = None
) -> RankedCompletions:
    """Put a row together: one kind of text on both sides, no empty and no repeated completion."""
    if any(not isinstance(text, str) for text in (prompt, *completions)):
        prompt = as_turns(prompt, "user")
        completions = [_without_tail(as_turns(completion, "assistant"), note) for completion in completions]
    filled = [completion for completion in completions if not is_empty(completion)]
    distinct = [completion for index, completion in enumerate(filled) if completion not in filled[:index]]
    if len(filled) < at_least:
        raise Dropped("empty completion")
    if len(distinct) < at_least:
        raise Dropped("identical sides")
    if len(distinct) < len(completions):
        note("empty or repeated completions of a ranked list left out")
    return RankedCompletions(prompt=prompt, completions=tuple(distinct), margin=margin)
