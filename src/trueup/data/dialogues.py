"""Whole dialogues: written in one string (HH-RLHF), and two that begin alike."""

from __future__ import annotations

import itertools
import re
from typing import Any

from trueup.data.data_format import Note
from trueup.errors import DataError
from trueup.records import Message

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_HH_LABEL = re.compile(r"\b(Human|Assistant):")


def is_hh(value: Any) -> bool:
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
