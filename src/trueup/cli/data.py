"""``trueup data``: look at data before training on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from trueup.errors import DataError, SettingsError
from trueup.runs.settings import check_used

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """Show what data files hold, and what exactly would be trained."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files (JSONL, JSON, CSV, Parquet; .gz and .zst too), globs, or hf:NAME."""
    tokenizer: Annotated[str | None, tyro.conf.arg(aliases=["--model"])] = None
    """Model or folder whose tokenizer and chat template to use: lengths in tokens, examples token for token."""
    task: Literal["auto", "sft", "preference", "process"] = "auto"
    """Read the rows as demonstrations, as preferences or as labelled steps; auto takes what they look like."""
    data_format: str = "auto"
    """Row format; auto looks at the first rows."""
    num_examples: int = 3
    """How many examples to show."""
    max_length: int = 1024
    """Most tokens in prompt + completion; a longer completion is cut, and its end is then not trained."""
    max_prompt_length: int | None = None
    """Most tokens in a prompt; by default only --max-length counts."""
    overlong_prompt: Literal["drop", "keep_end"] = "drop"
    """What to do with a prompt that is too long: drop its row, or keep the prompt's end."""
    overlong_completion: Literal["cut", "drop"] = "cut"
    """What to do with a completion that is too long: cut it, or drop its row."""
    train_turns: Literal["all", "last"] = "all"
    """Which assistant turns of a demonstration are trained."""
    train_on: Literal["completion", "all"] = "completion"
    """Which tokens of a demonstration are trained: see trueup sft. Needs --task sft."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: 'plain', a Jinja template, or a file that holds one."""
    wrap_text: bool = False
    """Put plain prompts and completions into chat turns, so that the chat template applies."""
    special_tokens_in_text: Literal["plain", "token"] = "plain"
    """What '<|im_end|>' and the like are inside data: plain text, or the token itself."""
    step_separator: str = "\n"
    """What stands between the steps of an answer that is labelled step by step."""

    def __post_init__(self) -> None:
        check_used(self, self.task == "sft", "--task sft", "train_on")


def check(settings: CheckSettings) -> None:
    """Print format, counts, lengths, dropped rows and examples.

    Raises ``SettingsError`` without files, ``DataError`` for files that can't be read, and at the end, after everything
    was shown, for rows that are malformed.
    """
    if not settings.files:
        raise SettingsError("no file is given", way_out="trueup data check FILE")
    from rich.console import Console

    from trueup.data.chat import TokenizeSettings
    from trueup.data.check import check_data, print_check

    found = check_data(
        settings.files,
        task=None if settings.task == "auto" else settings.task,
        data_format=settings.data_format,
        tokenizer=_tokenizer(settings.tokenizer),
        settings=TokenizeSettings(
            max_length=settings.max_length,
            max_prompt_length=settings.max_prompt_length,
            overlong_prompt=settings.overlong_prompt,
            overlong_completion=settings.overlong_completion,
            train_turns=settings.train_turns,
            chat_template=settings.chat_template,
            wrap_text=settings.wrap_text,
            special_tokens_in_text=settings.special_tokens_in_text,
            step_separator=settings.step_separator,
        ),
        train_on=settings.train_on,
        num_examples=settings.num_examples,
    )
    print_check(found, Console(), name=", ".join(settings.files))
    if found.report.malformed:
        first = found.report.malformed[0]
        raise DataError(
            f"{len(found.report.malformed):,} malformed rows, the first: {first.what}",
            where=first.where,
            way_out=first.way_out,
        )


def _tokenizer(name: str | None) -> PreTrainedTokenizerBase | None:
    if name is None:
        return None
    from trueup.models.load import load_tokenizer

    return load_tokenizer(name)
