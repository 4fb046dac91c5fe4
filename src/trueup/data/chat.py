"""From text to tokens: a prompt once, each completion as generation would see it, and which tokens are trained.

A conversation goes through the tokenizer's chat template. The prompt is rendered with the generation prompt, so that it
ends where the model begins to write; a completion is what the template puts behind it, up to and with the end-of-turn
token. Text inside a message can't become a control token: only the template writes those.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from trueup.data.cells import as_turns
from trueup.data.chat_template import WITHOUT_TEMPLATE, Chat, TemplateRefusal, chat_of
from trueup.data.data_format import Task
from trueup.data.encoder import Bounds, StepsNotFound
from trueup.data.formats import read_examples
from trueup.data.plain_text import PlainText, plain_text_of
from trueup.data.prompts import PromptRow, read_prompts
from trueup.data.report import ReadReport
from trueup.data.rows import Source, source_name
from trueup.data.settings import TokenizeSettings
from trueup.data.step_ends import joined_steps, step_ends
from trueup.errors import DataError, ModelError
from trueup.records import Completion, CompletionGroup, RankedCompletions, StopReason, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, settings: TokenizeSettings | None = None
) -> list[int]:
    """Tokens of a prompt as generation gets it: a conversation through the template with its generation prompt.

    Raises ``ModelError`` for a tokenizer without (usable) template, ``DataError`` for a conversation it refuses.
    """
    try:
        return _prompt_tokens(tokenizer, prompt, settings or TokenizeSettings())
    except TemplateRefusal as refusal:
        raise DataError(f"the chat template refuses this conversation: {refusal}", way_out=WITHOUT_TEMPLATE) from None


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Text, settings: TokenizeSettings) -> list[int]:
    if isinstance(prompt, str) and settings.wrap_text and prompt:
        prompt = as_turns(prompt, "user")
    if isinstance(prompt, str):
        return plain_text_of(tokenizer, settings).prompt(prompt)
    chat = chat_of(tokenizer, settings)
    return chat.encoder.encode(chat.prompt_text(prompt), continues=False)


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, row: PromptRow, settings: TokenizeSettings, report: ReadReport
) -> np.ndarray | None:
    """int64 [P]: the tokens of a prompt, the same that ``tokenize_group`` gives it; None for one that can't be used
    (empty, longer than the settings allow, refused by the chat template), which is counted in ``report``.

    Raises ``ModelError`` for a tokenizer without (usable) template.
    """
    try:
        tokens = _prompt_tokens(tokenizer, row.prompt, settings)
    except TemplateRefusal as refusal:
        report.drop(_refused(refusal), row.where)
        return None
    except ModelError as error:
        raise ModelError(error.what, where=error.where or row.where, way_out=error.way_out) from error
    kept = _fitted_prompt(tokens, row.where, settings, report)
    if kept is not None:
        report.num_prompts_cut += len(kept) < len(tokens)
    return None if kept is None else np.array(kept, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts to be answered: of each its row and its tokens, int64 [P]; and what became of the rows."""

    rows: tuple[PromptRow, ...]
    tokens: tuple[np.ndarray, ...]
    report: ReadReport


def load_prompts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: TokenizeSettings,
    limit: int | None = None,
    split: str | None = None,
) -> Prompts:
    """All prompts of a source, or of its first ``limit`` rows, in its order.

    Raises ``DataError`` where a row has no prompt or none is left, ``ModelError`` where the tokenizer does not do.
    """
    report = ReadReport()
    rows = itertools.islice(read_prompts(source, report=report, split=split), limit)
    read = [(row, tokenize_prompt(tokenizer, row, settings, report)) for row in rows]
    kept = [(row, tokens) for row, tokens in read if tokens is not None]
    if not kept:
        raise DataError(
            f"no prompt is left: {report.summary()}",
            where=source_name(source),
            way_out="look at the rows with `trueup data check --task prompt`, and at max_length",
        )
    return Prompts(rows=tuple(row for row, _ in kept), tokens=tuple(tokens for _, tokens in kept), report=report)


def completion_text(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int] | np.ndarray,
    prompt: Text,
    settings: TokenizeSettings | None = None,
) -> Text:
    """What a model said behind ``prompt``: a string where the prompt is one, otherwise one turn of the assistant.

    Without the end token, other special tokens and what the chat template puts around an answer, so that tokenising it
    again as a completion gives the tokens back wherever the tokenizer would have written the text in these tokens.
    """
    settings = settings or TokenizeSettings()
    written = [int(token) for token in tokens]
    if written and written[-1] in stop_token_ids(tokenizer, settings):
        written = written[:-1]
    if isinstance(prompt, str) and not settings.wrap_text:
        return plain_text_of(tokenizer, settings).encoder.decode(written)
    chat = chat_of(tokenizer, settings)
    answer = chat.answer(chat.encoder.decode(written))
    return answer if isinstance(prompt, str) else as_turns(answer, "assistant")


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings | None = None) -> list[int]:
    """The tokens at which generation has to stop: the end of a text and, where there is a template, of a turn."""
    settings = settings or TokenizeSettings()
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template or settings.chat_template:
        # With a template that is of no use the data can only be plain text: tokenising a conversation raises.
        with contextlib.suppress(ModelError):
            found.append(tokenizer.convert_tokens_to_ids(chat_of(tokenizer, settings).end_text))
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
            form = plain_text_of(tokenizer, settings)
            prompt, completions = _plain_tokens(form, example, settings)
        else:
            form = chat_of(tokenizer, settings)
            prompt, completions = _chat_tokens(form, example, settings)
    except TemplateRefusal as refusal:
        report.drop(_refused(refusal), example.where)
        return None
    except StepsNotFound as reason:
        report.drop(str(reason), example.where)
        return None
    except ModelError as error:
        raise ModelError(error.what, where=error.where or example.where, way_out=error.way_out) from error
    group = _fitted(prompt, completions, example, settings, report)
    if group is not None and form.encoder.finds((example.prompt, example.completions)):
        report.note("text of special tokens in the data, read as plain text", example.where)
    return group


def _prepared(example: RankedCompletions, settings: TokenizeSettings) -> RankedCompletions:
    """The example with plain text wrapped and earlier turns moved to the prompt, where the settings say so."""
    prompt, completions = example.prompt, example.completions
    if len({isinstance(text, str) for text in (prompt, *completions)}) > 1:
        raise DataError("plain text and conversations in one row", where=example.where, way_out="make both of one kind")
    if settings.wrap_text and isinstance(prompt, str) and prompt:
        prompt = as_turns(prompt, "user")
        completions = tuple(as_turns(completion, "assistant") for completion in completions)
    if settings.train_turns == "last" and len(completions) == 1 and not isinstance(prompt, str):
        turns = as_turns(completions[0], "assistant")
        last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        prompt, completions = (*prompt, *turns[:last]), (turns[last : last + 1],)
    return replace(example, prompt=prompt, completions=completions)


def _plain_tokens(
    text: PlainText, example: RankedCompletions, settings: TokenizeSettings
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
    chat: Chat, example: RankedCompletions, settings: TokenizeSettings
) -> tuple[list[int], list[Completion]]:
    assert not isinstance(example.prompt, str)
    prompt_text = chat.prompt_text(example.prompt)
    prompt = chat.encoder.encode(prompt_text, continues=False)
    if example.steps is not None:
        encode = functools.partial(chat.stepwise, example.prompt, prompt_text)
        return prompt, _stepwise_completions(example, settings, encode)
    answers = (as_turns(each, "assistant") for each in example.completions)
    return prompt, [_completion(*chat.completion(example.prompt, turns, prompt_text)) for turns in answers]


def _completion(tokens: list[int], mask: list[bool] | None = None) -> Completion:
    return Completion(
        tokens=np.array(tokens, dtype=np.int64),
        mask=None if mask is None or all(mask) else np.array(mask, dtype=bool),
    )


def _stepwise_completions(
    example: RankedCompletions,
    settings: TokenizeSettings,
    encode: Callable[[str, Sequence[int]], tuple[list[int], Bounds]],
) -> list[Completion]:
    """Each completion as one text, tokenised whole as a model would write it, and the last token of each of its steps.

    Tokenising step by step would give other tokens than generation does: ``.\n`` is one token of many tokenizers.
    """
    completions = []
    for steps, labels in itertools.zip_longest(example.steps or (), example.step_labels or ()):
        text, bounds = joined_steps(steps, settings.step_separator)
        tokens, found = encode(text, bounds)
        given = None if labels is None else np.array(labels, dtype=np.float32)  # None becomes NaN
        completions.append(replace(_completion(tokens), step_ends=step_ends(found), step_labels=given))
    return completions


def _fitted(
    prompt: list[int],
    completions: list[Completion],
    example: RankedCompletions,
    settings: TokenizeSettings,
    report: ReadReport,
) -> CompletionGroup | None:
    """The group within the length limits, or None; every cut is counted."""
    kept = _fitted_prompt(prompt, example.where, settings, report)
    if kept is None:
        return None
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


def _fitted_prompt(prompt: list[int], where: str, settings: TokenizeSettings, report: ReadReport) -> list[int] | None:
    """The prompt within the length limit, or None, which is counted."""
    if not prompt:
        report.drop("empty prompt", where)
        return None
    if len(prompt) > settings.prompt_limit and settings.overlong_prompt == "drop":
        report.drop(f"prompt longer than {settings.prompt_limit} tokens", where)
        return None
    return prompt[-settings.prompt_limit :]


def _refused(refusal: TemplateRefusal) -> str:
    return f"the chat template refuses the conversation ({refusal})"


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
