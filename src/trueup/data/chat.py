"""From text to tokens: a prompt once, each completion as generation would see it, and which tokens are trained.

A conversation goes through the tokenizer's chat template. The prompt is rendered with the generation prompt, so that it
ends where the model begins to write; a completion is what the template puts behind it, up to and with the end-of-turn
token. Text inside a message can't become a control token: only the template writes those.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trueup.data.formats import ReadReport, Source, Task, read_examples, source_name
from trueup.data.settings import TokenizeSettings
from trueup.errors import DataError, ModelError, SettingsError
from trueup.records import Completion, CompletionGroup, Message, RankedCompletions, StopReason, Text

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


# ------------------------------------------------------------------------------------------------- text → tokens

# Unicode noncharacters: no text means anything by them, and those in the data are marked like control tokens.
_OPEN, _CLOSE, _BOUND = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKED = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class _Encoder:
    """Encodes text so that only what the library and the template write can become a control token.

    ``mark`` replaces control-token text in data by a mark before a template sees it; ``encode`` encodes the rest as
    usual and what was marked as plain text. Control tokens are all special tokens and those that the template puts
    around a user's turn; other added tokens (``<think>``, ``<tool_call>``) may be written by anyone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Sequence[str], *, mark_control: bool) -> None:
        self._tokenizer = tokenizer
        self.control = tuple(sorted(control, key=lambda text: (-len(text), text)))
        self._literals = (*(self.control if mark_control else ()), _OPEN, _CLOSE, _BOUND)
        self._index = {text: index for index, text in enumerate(self._literals)}
        self._find = re.compile("|".join(map(re.escape, self._literals)))
        # What the vocabulary can't write becomes the unknown token, whoever writes it: it controls nothing.
        self._control_ids = set(tokenizer.convert_tokens_to_ids(list(self.control))) - {tokenizer.unk_token_id}  # type: ignore[arg-type]
        self._plain: dict[int, list[int]] = {}
        # A tokenizer of the SentencePiece kind puts a space before whatever it is given. In the middle of a text that
        # would be one too many: encode behind a line break, then take the break away.
        self._break = self._ids("\n")
        self._needs_break = self._ids("\nx")[len(self._break) :] != self._ids("x")

    def _ids(self, text: str, **options: Any) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])  # type: ignore[arg-type]

    def mark(self, value: Any) -> Any:
        """``value`` (a string, or lists and dicts of them) with every control-token text marked."""
        if isinstance(value, str):
            return self._find.sub(lambda found: f"{_OPEN}{self._index[found[0]]}{_CLOSE}", value)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def finds(self, value: Any) -> bool:
        """Whether control-token text stands anywhere in ``value``."""
        if isinstance(value, str):
            return self._find.search(value) is not None
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return any(map(self.finds, inner))

    def mark_bounds(self, text: str, bounds: Sequence[int]) -> str:
        """``mark(text)`` with a further mark at every bound, a number of characters; ``encode_bounds`` finds them.

        Raises ``StepsNotFound`` where control-token text stands across a bound: marked in parts it would be a token.
        """
        if any(found.start() < bound < found.end() for found in self._find.finditer(text) for bound in bounds):
            raise StepsNotFound("text of special tokens runs over the end of a step")
        parts = itertools.pairwise((0, *bounds, len(text)))
        return _BOUND.join(self.mark(text[start:end]) for start, end in parts)

    def encode(self, marked: str, *, continues: bool) -> list[int]:
        """Tokens of a marked text, which stands at the beginning or ``continues`` another."""
        return self.encode_bounds(marked, continues=continues)[0]

    def encode_bounds(self, marked: str, *, continues: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens, the same as without bounds, and for every bound how many of them begin before it, and how many
        have ended by then. The two differ where a token stands across the bound."""
        tokens: list[int] = []
        bounds: list[tuple[int, int]] = []
        for index, piece in enumerate(_MARKED.split(marked)):
            if index % 2:
                tokens += self._as_plain(int(piece))
                continue
            if _OPEN in piece or _CLOSE in piece:
                raise ModelError("the chat template cuts into a message's text", way_out="set another chat_template")
            *parts, _ = piece.split(_BOUND)
            found, spans = self._located(
                piece.replace(_BOUND, ""), continues=continues or bool(tokens), with_spans=bool(parts)
            )
            for bound in itertools.accumulate(map(len, parts)):
                begun, ended = sum(start < bound for start, _ in spans), sum(end <= bound for _, end in spans)
                bounds.append((len(tokens) + begun, len(tokens) + ended))
            tokens += found
        return tokens, bounds

    def _located(self, text: str, *, continues: bool, with_spans: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of unmarked text, and if asked for which of its characters each was made of."""
        if not text:
            return [], []
        if with_spans and not self._tokenizer.is_fast:
            raise ModelError(
                "the tokenizer does not say which characters a token is made of, so steps can't be found in its tokens",
                way_out="take a model with a tokenizer.json",
            )
        before = "\n" if continues and self._needs_break else ""
        encoded = self._tokenizer(
            before + text, add_special_tokens=False, verbose=False, return_offsets_mapping=with_spans
        )
        tokens: list[int] = list(encoded["input_ids"])  # type: ignore[arg-type]
        spans: list[tuple[int, int]] = encoded["offset_mapping"] if with_spans else []  # type: ignore[assignment]
        if not before:
            return tokens, spans
        skipped = len(self._break)
        if tokens[:skipped] != self._break:
            return self._located(text, continues=False, with_spans=with_spans)
        return tokens[skipped:], [(start - 1, end - 1) for start, end in spans[skipped:]]

    def _as_plain(self, index: int) -> list[int]:
        if index not in self._plain:
            self._plain[index] = self._tokens_of_literal(self._literals[index])
        return self._plain[index]

    def _tokens_of_literal(self, text: str) -> list[int]:
        whole = self._ids(text, split_special_tokens=True)
        by_character = itertools.chain.from_iterable(self._ids(character) for character in text)
        for tokens in (whole, list(by_character)):
            if not self._control_ids.intersection(tokens):
                return tokens
        raise ModelError(
            f"the tokenizer has no way to write {text!r} as plain text",
            way_out="remove it from the data, or trust it: special_tokens_in_text='token'",
        )


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def _bracketed_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Added tokens that look like marks, ``<…>`` or ``[…]``. Others are words or spaces, added to save tokens."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return {text for text in texts if re.fullmatch(r"[^\w\s].*[^\w\s]", text)}


def _start_and_end(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int | None]:
    """(the tokens that the tokenizer puts before plain text, the token that ends it)."""
    bare = list(tokenizer("x", add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    full = list(tokenizer("x")["input_ids"])  # type: ignore[arg-type]
    end = tokenizer.eos_token_id
    if not bare:  # a vocabulary that has no "x" and drops it: what is left are the start and perhaps the end token
        return [token for token in full if token != end], end  # type: ignore[return-value]
    start = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
    return full[:start], end  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------- plain text


class _PlainText:
    """Plain text: the tokenizer's start token, if it adds one, and its end-of-text token behind a completion."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> None:
        self.start, end = _start_and_end(tokenizer)
        if end is None:
            raise ModelError(
                "the tokenizer has no end-of-text token (eos_token), so a text could not end",
                way_out="set eos_token in its tokenizer_config.json",
            )
        self.end = end
        self.encoder = _Encoder(
            tokenizer, list(_special_texts(tokenizer)), mark_control=settings.special_tokens_in_text == "plain"
        )

    def prompt(self, text: str) -> list[int]:
        return self.start + self.encoder.encode(self.encoder.mark(text), continues=False)

    def completion(self, text: str, *, continues: bool = True) -> list[int]:
        return self._ended(self.encoder.encode(self.encoder.mark(text), continues=continues))

    def stepwise(self, text: str, bounds: Sequence[int], *, continues: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of ``completion``, and those around every bound (see ``_Encoder.encode_bounds``)."""
        tokens, found = self.encoder.encode_bounds(self.encoder.mark_bounds(text, bounds), continues=continues)
        return self._ended(tokens), found

    def _ended(self, tokens: list[int]) -> list[int]:
        # Text that is trusted to hold tokens may bring its own end token.
        return tokens if tokens and tokens[-1] == self.end else [*tokens, self.end]


# -------------------------------------------------------------------------------------------------- conversations

_ANSWER = "The answer stands here."


class _Chat:
    """A tokenizer's chat template, tried once: how it opens an assistant's turn and which token ends it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> None:
        self._tokenizer = tokenizer
        template = _template(tokenizer, settings)
        self._template = FIXED_DATE + template if "strftime_now" in template else template
        self._start_text = tokenizer.decode(_start_and_end(tokenizer)[0])
        question: Conversation = ({"role": "user", "content": "A question."},)
        try:
            asked = self.render(question, answer_next=True)
            told = self.render((*question, {"role": "assistant", "content": _ANSWER}))
            user_turn = self.render(question)
        except TemplateRefusal as error:
            raise ModelError(
                f"the chat template fails on a question with an answer: {error}", way_out=WITHOUT_TEMPLATE
            ) from error
        special = _special_texts(tokenizer)
        marks = special | _bracketed_texts(tokenizer)
        self.end_text = self._find_end(told, marks)
        around = {text for text in marks if text in user_turn}
        self.encoder = _Encoder(
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

    def stepwise(
        self, prompt: Conversation, prompt_text: str, text: str, bounds: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of an answer of one turn, and those around every bound (see ``_Encoder.encode_bounds``).

        Raises ``StepsNotFound`` where the template does not carry the text through as it is.
        """
        (plain, _), (bounded, _) = (
            part
            for marked in (self.encoder.mark(text), self.encoder.mark_bounds(text, bounds))
            for part in self.completion_parts(prompt, _turn("assistant", marked), prompt_text)
        )
        tokens, found = self.encoder.encode_bounds(bounded, continues=True)
        if bounded.replace(_BOUND, "") != plain or len(found) != len(bounds):
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


class StepsNotFound(Exception):
    """It can't be told which token a step ends with. The message is the reason that gets counted."""


class TemplateRefusal(Exception):
    """A chat template raised: it does not take this conversation (two user turns in a row, a system prompt, …)."""


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
def _plain_text(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> _PlainText:
    return _PlainText(tokenizer, settings)


@functools.lru_cache(maxsize=8)
def _chat_of(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, template: str) -> _Chat:
    return _Chat(tokenizer, settings)


def _chat(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> _Chat:
    return _chat_of(tokenizer, settings, json.dumps(tokenizer.chat_template))


# ------------------------------------------------------------------------------------------------------- examples


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, settings: TokenizeSettings | None = None
) -> list[int]:
    """Tokens of a prompt as generation gets it: a conversation through the template with its generation prompt.

    Raises ``ModelError`` for a tokenizer without (usable) template, ``DataError`` for a conversation it refuses.
    """
    settings = settings or TokenizeSettings()
    if isinstance(prompt, str) and settings.wrap_text:
        prompt = _turn("user", prompt)
    if isinstance(prompt, str):
        return _plain_text(tokenizer, settings).prompt(prompt)
    chat = _chat(tokenizer, settings)
    try:
        return chat.encoder.encode(chat.prompt_text(prompt), continues=False)
    except TemplateRefusal as refusal:
        raise DataError(f"the chat template refuses this conversation: {refusal}", way_out=WITHOUT_TEMPLATE) from None


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings | None = None) -> list[int]:
    """The tokens at which generation has to stop: the end of a text and, where there is a template, of a turn."""
    settings = settings or TokenizeSettings()
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template or settings.chat_template:
        # With a template that is of no use the data can only be plain text: tokenising a conversation raises.
        with contextlib.suppress(ModelError):
            found.append(tokenizer.convert_tokens_to_ids(_chat(tokenizer, settings).end_text))
    return list(dict.fromkeys(found))  # type: ignore[arg-type]


def tokenize_group(
    tokenizer: PreTrainedTokenizerBase, example: RankedCompletions, settings: TokenizeSettings, report: ReadReport
) -> CompletionGroup | None:
    """The tokens of one prompt and its completions; None, counted in ``report``, for a row that can't be used.

    The prompt is tokenised once, each completion on its own behind it, and ends with the end token: of a turn in a
    conversation, of the text otherwise. A completion longer than ``max_length`` allows is cut; then it has no end token
    and ``StopReason.LENGTH``. In a completion of several turns ``mask`` is True on what the assistant wrote.

    Raises ``ModelError`` for a tokenizer that lacks an end token or a usable template, ``DataError`` for a row that
    mixes plain text with conversations.
    """
    example = _prepared(example, settings)
    try:
        if isinstance(example.prompt, str):
            form = _plain_text(tokenizer, settings)
            prompt, completions = _plain_tokens(form, example, settings)
        else:
            form = _chat(tokenizer, settings)
            prompt, completions = _chat_tokens(form, example, settings)
    except TemplateRefusal as refusal:
        report.drop(f"the chat template refuses the conversation ({refusal})", example.where)
        return None
    except StepsNotFound as reason:
        report.drop(str(reason), example.where)
        return None
    except ModelError as error:
        raise ModelError(error.what, where=error.where or example.where, way_out=error.way_out) from error
    if not prompt:
        report.drop("empty prompt", example.where)
        return None
    group = _fitted(prompt, completions, example, settings, report)
    if group is not None and form.encoder.finds((example.prompt, example.completions)):
        report.note("text of special tokens in the data, read as plain text", example.where)
    return group


def _turn(role: str, text: Text) -> Conversation:
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def _prepared(example: RankedCompletions, settings: TokenizeSettings) -> RankedCompletions:
    """The example with plain text wrapped and earlier turns moved to the prompt, where the settings say so."""
    prompt, completions = example.prompt, example.completions
    if len({isinstance(text, str) for text in (prompt, *completions)}) > 1:
        raise DataError("plain text and conversations in one row", where=example.where, way_out="make both of one kind")
    if settings.wrap_text and isinstance(prompt, str) and prompt:
        prompt = _turn("user", prompt)
        completions = tuple(_turn("assistant", completion) for completion in completions)
    if settings.train_turns == "last" and len(completions) == 1 and not isinstance(prompt, str):
        turns = _turn("assistant", completions[0])
        last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        prompt, completions = (*prompt, *turns[:last]), (turns[last : last + 1],)
    return replace(example, prompt=prompt, completions=completions)


def _plain_tokens(
    text: _PlainText, example: RankedCompletions, settings: TokenizeSettings
) -> tuple[list[int], list[Completion]]:
    prompt = text.prompt(str(example.prompt)) if example.prompt else list(text.start)
    if example.steps is not None:
        encode = functools.partial(text.stepwise, continues=bool(example.prompt))
        return prompt, _stepwise_completions(example, settings, encode)
    if not prompt and len(example.completions) == 1:
        # Nothing stands before the text: its first token is what the rest is predicted from.
        first, *rest = text.completion(str(example.completions[0]), continues=False)
        return [first], [_completion(rest)]
    continues = bool(example.prompt)
    return prompt, [_completion(text.completion(str(each), continues=continues)) for each in example.completions]


def _chat_tokens(
    chat: _Chat, example: RankedCompletions, settings: TokenizeSettings
) -> tuple[list[int], list[Completion]]:
    assert not isinstance(example.prompt, str)
    prompt_text = chat.prompt_text(example.prompt)
    prompt = chat.encoder.encode(prompt_text, continues=False)
    if example.steps is not None:
        encode = functools.partial(chat.stepwise, example.prompt, prompt_text)
        return prompt, _stepwise_completions(example, settings, encode)
    completions = []
    for turns in example.completions:
        tokens: list[int] = []
        mask: list[bool] = []
        marked = chat.encoder.mark(_turn("assistant", turns))
        for text, trained in chat.completion_parts(example.prompt, marked, prompt_text):
            part = chat.encoder.encode(text, continues=True)
            tokens += part
            mask += [trained] * len(part)
        completions.append(_completion(tokens, mask))
    return prompt, completions


def _completion(tokens: list[int], mask: list[bool] | None = None, *, cut: bool = False) -> Completion:
    return Completion(
        tokens=np.array(tokens, dtype=np.int64),
        mask=None if mask is None or all(mask) else np.array(mask, dtype=bool),
        stop_reason=StopReason.LENGTH if cut else StopReason.END,
    )


def _stepwise_completions(
    example: RankedCompletions,
    settings: TokenizeSettings,
    encode: Callable[[str, Sequence[int]], tuple[list[int], list[tuple[int, int]]]],
) -> list[Completion]:
    """Each completion as one text, tokenised whole as a model would write it, and the last token of each of its steps.

    Tokenising step by step would give other tokens than generation does: ``.\n`` is one token of many tokenizers.
    """
    completions = []
    for steps, labels in itertools.zip_longest(example.steps or (), example.step_labels or ()):
        text, bounds = _joined_steps(steps, settings.step_separator)
        tokens, found = encode(text, bounds)
        given = None if labels is None else np.array(labels, dtype=np.float32)  # None becomes NaN
        completions.append(replace(_completion(tokens), step_ends=_step_ends(found), step_labels=given))
    return completions


def _joined_steps(steps: Sequence[str], separator: str) -> tuple[str, list[int]]:
    """The steps as one text, and where in it the first ends, the second begins, …, the last ends, without spaces."""
    text, bounds = "", []
    for step in steps:
        text += separator if bounds else ""
        start = len(text) + len(step) - len(step.lstrip())
        text += step
        bounds += [start, len(text.rstrip())]
    return text, bounds[1:]


def _step_ends(bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """int64 [M]: the index of the last token of each step: the one that holds its last character, spaces left out.

    ``bounds``: as ``_Encoder.encode_bounds`` counts at the bounds of ``_joined_steps``. Raises ``StepsNotFound`` where
    a token belongs to two steps: a score there would know of the next one.
    """
    ends = np.array([begun - 1 for begun, _ in bounds[::2]], dtype=np.int64)
    before_next = np.array([ended for _, ended in bounds[1::2]], dtype=np.int64)
    if (ends[:-1] >= before_next).any() or (np.diff(ends, prepend=-1) < 1).any():
        raise StepsNotFound("one token holds the end of a step and the start of the next")
    return ends


def _fitted(
    prompt: list[int],
    completions: list[Completion],
    example: RankedCompletions,
    settings: TokenizeSettings,
    report: ReadReport,
) -> CompletionGroup | None:
    """The group within the length limits, or None; every cut is counted."""
    if len(prompt) > settings.prompt_limit and settings.overlong_prompt == "drop":
        report.drop(f"prompt longer than {settings.prompt_limit} tokens", example.where)
        return None
    kept = prompt[-settings.prompt_limit :]
    room = settings.max_length - len(kept)
    num_cut = sum(len(completion.tokens) > room for completion in completions)
    if num_cut and settings.overlong_completion == "drop":
        report.drop(f"prompt and completion longer than {settings.max_length} tokens", example.where)
        return None
    num_steps = sum(map(_num_steps, completions))
    completions = [_cut(completion, room) for completion in completions]
    if len({completion.tokens.tobytes() for completion in completions}) < len(completions):
        report.drop("identical sides within the length limit", example.where)
        return None
    if not all(completion.completion_mask.any() for completion in completions):
        report.drop("no trained token within the length limit", example.where)
        return None
    if any(labels is not None and np.isnan(labels).all() for labels in (each.step_labels for each in completions)):
        report.drop("no labelled step within the length limit", example.where)
        return None
    if sum(map(_num_steps, completions)) < num_steps:
        report.note("steps behind the length limit left out", example.where)
    report.num_completions_cut += num_cut
    report.num_prompts_cut += len(kept) < len(prompt)
    return CompletionGroup(
        prompt=np.array(kept, dtype=np.int64),
        completions=tuple(completions),
        where=example.where,
        margin=example.margin,
        desirable=example.desirable,
    )


def _num_steps(completion: Completion) -> int:
    return 0 if completion.step_ends is None else len(completion.step_ends)


def _cut(completion: Completion, room: int) -> Completion:
    if len(completion.tokens) <= room:
        return completion
    mask, ends, labels = completion.mask, completion.step_ends, completion.step_labels
    whole = slice(None) if ends is None else slice(int((ends < room).sum()))
    return replace(
        completion,
        tokens=completion.tokens[:room],
        mask=None if mask is None else mask[:room],
        stop_reason=StopReason.LENGTH,
        step_ends=None if ends is None else ends[whole],
        step_labels=None if labels is None else labels[whole],
    )


# -------------------------------------------------------------------------------------------------- whole sources


def stream_groups(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Task,
    data_format: str = "auto",
    settings: TokenizeSettings,
    report: ReadReport,
    split: str | None = None,
) -> Iterator[CompletionGroup]:
    """Tokenised groups of a source, one at a time, in its order; ``report`` is filled on the way."""
    for example in read_examples(source, task=task, data_format=data_format, report=report, split=split):
        group = tokenize_group(tokenizer, example, settings, report)
        if group is not None:
            yield group


def load_groups(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Task,
    data_format: str = "auto",
    settings: TokenizeSettings,
    limit: int | None = None,
    split: str | None = None,
) -> tuple[list[CompletionGroup], ReadReport]:
    """All tokenised groups of a source (or its first ``limit``), and what became of its rows.

    Raises ``DataError`` where a row is malformed or no row is left, ``ModelError`` where the tokenizer does not do.
    """
    report = ReadReport()
    groups = stream_groups(
        source, tokenizer, task=task, data_format=data_format, settings=settings, report=report, split=split
    )
    loaded = list(itertools.islice(groups, limit))
    if not loaded:
        raise DataError(
            f"no row is left to train on: {report.summary()}",
            where=source_name(source),
            way_out="look at the rows with `trueup data check`, and at max_length",
        )
    return loaded, report
