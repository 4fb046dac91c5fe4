"""Conversations as tokens: a tokenizer's chat template, tried before it is trusted."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trueup.data.cells import as_turns
from trueup.data.encoder import BOUND, Bounds, Encoder, StepsNotFound, bracketed_texts, special_texts, start_and_end
from trueup.data.settings import TokenizeSettings
from trueup.errors import ModelError, SettingsError
from trueup.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = tuple[Message, ...]

PLAIN_TEMPLATE = (
    "{{ start_text }}{% for message in messages %}"
    "{{ '\\n\\n' if not loop.first else '' }}"
    "{{ {'user': 'Human', 'assistant': 'Assistant'}.get(message['role'], message['role'] | capitalize) }}: "
    "{{- ' ' ~ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
"""The built-in template for tokenizers that have none: ``Human: …``, ``Assistant: …`` and the end-of-text token."""

# Some templates write today's date. Tokens must not depend on the day.
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%Y', '2025') | replace('%m', '01') | replace('%d', '01') "
    "| replace('%B', 'January') | replace('%b', 'Jan') | replace('%A', 'Wednesday') | replace('%a', 'Wed') }}"
    "{%- endmacro -%}"
)

WITHOUT_TEMPLATE = "set chat_template to 'plain' (Human: / Assistant:), or to a Jinja template or a file that holds one"

_ANSWER = "The answer stands here."


class TemplateRefusal(Exception):
    """A chat template raised: it does not take this conversation (two user turns in a row, a system prompt, …)."""


class Chat:
    """A tokenizer's chat template, tried once: how it opens an assistant's turn and which token ends it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> None:
        self._tokenizer = tokenizer
        template = _template(tokenizer, settings)
        self._template = FIXED_DATE + template if "strftime_now" in template else template
        self._start_text = tokenizer.decode(start_and_end(tokenizer)[0])
        question: Conversation = ({"role": "user", "content": "A question."},)
        try:
            asked = self.render(question, answer_next=True)
            told = self.render((*question, {"role": "assistant", "content": _ANSWER}))
            user_turn = self.render(question)
        except TemplateRefusal as error:
            raise ModelError(
                f"the chat template fails on a question with an answer: {error}", way_out=WITHOUT_TEMPLATE
            ) from error
        special = special_texts(tokenizer)
        marks = special | bracketed_texts(tokenizer)
        self.end_text = self._find_end(told, marks)
        self._around = self._texts_around(asked, told)
        around = {text for text in marks if text in user_turn}
        self.encoder = Encoder(
            tokenizer,
            [*(special | around | {self.end_text})],
            mark_control=settings.special_tokens_in_text == "plain",
        )
        self._check_opening(asked, user_turn, told, marks)

    @staticmethod
    def _find_end(told: str, marks: set[str]) -> str:
        _, found, tail = told.rpartition(_ANSWER)
        if not found:
            raise ModelError("the chat template leaves out what the assistant says", way_out=WITHOUT_TEMPLATE)
        first = min((text for text in marks if text in tail), key=lambda t: (tail.index(t), -len(t)), default=None)
        if first is None:
            raise ModelError(
                "the chat template puts no end token behind an assistant's turn, so a model could not learn to stop",
                way_out=WITHOUT_TEMPLATE,
            )
        return first

    def _texts_around(self, asked: str, told: str) -> tuple[str, str]:
        """What the template puts before an answer, behind the generation prompt, and between it and its end token."""
        before, _, behind = told.rpartition(_ANSWER)
        return before.removeprefix(asked), behind.partition(self.end_text)[0]

    def answer(self, text: str) -> str:
        """What the assistant said in a completion's ``text``, which has no end token: without the template's own."""
        before, behind = self._around
        return text.removeprefix(before).removesuffix(behind)

    @staticmethod
    def _check_opening(asked: str, user_turn: str, told: str, marks: set[str]) -> None:
        opening = told[len(asked) :].partition(_ANSWER)[0] if told.startswith(asked) else ""
        header = any(text in opening for text in marks) or any(character.isalnum() for character in opening)
        if asked == user_turn and (header or not told.startswith(asked)):
            raise ModelError(
                "the chat template knows no generation prompt (it ignores add_generation_prompt), so that the place "
                "where the model begins to write is not known",
                way_out="add '{% if add_generation_prompt %}…{% endif %}' to the template, or " + WITHOUT_TEMPLATE,
            )
        if not told.startswith(asked):
            raise _rewriting("its generation prompt is not how it begins an assistant's turn")

    def render(self, messages: Sequence[Message], *, answer_next: bool = False) -> str:
        """The template's text for messages; raises ``TemplateRefusal`` where the template raises."""
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
                [dict(message) for message in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=answer_next,
                start_text=self._start_text,
            )
        except (jinja2.TemplateError, TypeError, AttributeError) as error:
            raise TemplateRefusal(_one_line(str(error)) or type(error).__name__) from error

    def prompt_text(self, prompt: Conversation) -> str:
        """The marked text of a prompt, generation prompt included."""
        return self.render(self.encoder.mark(prompt), answer_next=True)

    def completion_parts(
        self, prompt: Conversation, completion: Conversation, prompt_text: str
    ) -> list[tuple[str, bool]]:
        """The marked texts behind the prompt, in order, each with whether the model wrote it; ``completion`` is marked.

        Every assistant turn is rendered as generation meets it: with the turns before it and the generation prompt.
        Raises ``ModelError`` where the template renders earlier turns differently once later ones follow: then no one
        stream of tokens is what generation would have seen.
        """
        turns = (*self.encoder.mark(prompt), *completion)
        parts: list[tuple[str, bool]] = []
        done = ""
        for index in range(len(prompt), len(turns)):
            if turns[index]["role"] != "assistant":
                continue
            before = prompt_text if index == len(prompt) else self.render(turns[:index], answer_next=True)
            after = self.render(turns[: index + 1])
            if not before.startswith(done or prompt_text):
                raise _rewriting("it renders earlier turns differently once later ones follow")
            if not after.startswith(before):
                raise _rewriting("its generation prompt is not how it begins this assistant's turn")
            if before != prompt_text:
                parts.append((before[len(done or prompt_text) :], False))
            end = self._turn_end(after, len(before))
            parts.append((after[len(before) : end], True))
            done = after[:end]
        return parts

    def completion(
        self, prompt: Conversation, completion: Conversation, prompt_text: str
    ) -> tuple[list[int], list[bool]]:
        """The tokens behind the prompt, and of each whether the model wrote it."""
        tokens: list[int] = []
        mask: list[bool] = []
        for text, trained in self.completion_parts(prompt, self.encoder.mark(completion), prompt_text):
            part = self.encoder.encode(text, continues=True)
            tokens += part
            mask += [trained] * len(part)
        return tokens, mask

    def stepwise(
        self, prompt: Conversation, prompt_text: str, text: str, bounds: Sequence[int]
    ) -> tuple[list[int], Bounds]:
        """Tokens of an answer of one turn, and those around every bound.

        Raises ``StepsNotFound`` where the template does not carry the text through as it is.
        """
        (plain, _), (bounded, _) = (
            part
            for marked in (self.encoder.mark(text), self.encoder.mark_bounds(text, bounds))
            for part in self.completion_parts(prompt, as_turns(marked, "assistant"), prompt_text)
        )
        tokens, found = self.encoder.encode_bounds(bounded, continues=True)
        if bounded.replace(BOUND, "") != plain or len(found) != len(bounds):
            raise StepsNotFound("the chat template changes an answer in a way that hides its steps")
        return tokens, found

    def _turn_end(self, text: str, start: int) -> int:
        """Where the turn that begins at ``start`` ends: behind its last end token, or its last control token."""
        for candidates in ((self.end_text,), self.encoder.control):
            end = max((at + len(each) for each in candidates if (at := text.rfind(each, start)) >= 0), default=-1)
            if end >= 0:
                return end
        raise ModelError("the chat template leaves an assistant's turn without an end token", way_out=WITHOUT_TEMPLATE)


def _one_line(text: str) -> str:
    """The message of a template, which may quote the data: one line, nothing that a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text[:200])


def _rewriting(how: str) -> ModelError:
    return ModelError(
        f"the chat template can't be trained on turn by turn: {how}",
        way_out="train the last turn only (train_turns='last'), or set another chat_template",
    )


def _template(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> str:
    chosen = settings.chat_template
    if chosen == "plain":
        return PLAIN_TEMPLATE
    if chosen is not None and "{" not in chosen:
        try:
            return Path(chosen).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"chat_template is neither 'plain' nor a template nor a file that can be read ({error})", where=chosen
            ) from error
    if chosen is not None:
        return chosen
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            "these data are conversations, but the tokenizer has no chat template", way_out=WITHOUT_TEMPLATE
        ) from error


# The template text is part of the key, since a tokenizer's may be set after it was first used.
@functools.lru_cache(maxsize=8)
def _cached(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, template: str) -> Chat:
    return Chat(tokenizer, settings)


def chat_of(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> Chat:
    return _cached(tokenizer, settings, json.dumps(tokenizer.chat_template))
