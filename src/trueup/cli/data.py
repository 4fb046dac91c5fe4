"""``trueup data``: look at data before training on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from trueup.data.settings import TokenizeSettings
from trueup.errors import DataError, SettingsError
from trueup.runs.settings import check_used

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class LookSettings:
    """What is looked at."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files (JSONL, JSON, CSV, Parquet; .gz and .zst too), globs, or hf:NAME."""
    tokenizer: Annotated[str | None, tyro.conf.arg(aliases=["--model"])] = None
    """Model or folder whose tokenizer and chat template to use: lengths in tokens, examples token for token."""
    task: Literal["auto", "sft", "preference", "process", "prompt"] = "auto"
    """Read the rows as demonstrations, as preferences, as labelled steps, or their prompts alone; auto takes what they
    look like."""
    data_format: str = "auto"
    """Row format; auto looks at the first rows."""
    num_examples: int = 3
    """How many examples to show."""


@dataclass(frozen=True, kw_only=True)
class CheckSettings(TokenizeSettings, LookSettings):
    """Show what data files hold, and what exactly would be trained."""

    train_on: Literal["completion", "all"] = "completion"
    """Which tokens of a demonstration are trained: see trueup sft. Needs --task sft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_used(self, self.task == "sft", "--task sft", "train_on")


def check(settings: CheckSettings) -> None:
    """Print format, counts, lengths, dropped rows and examples.

    Raises ``SettingsError`` without files, ``DataError`` for files that can't be read, and at the end, after everything
    was shown, for rows that are malformed.
    """
    if not settings.files:
        raise SettingsError("no file is given", way_out="trueup data check FILE")
    from rich.console import Console

    from trueup.data.check import check_data, print_check

    found = check_data(
        settings.files,
        task=None if settings.task == "auto" else settings.task,
        data_format=settings.data_format,
        tokenizer=_tokenizer(settings.tokenizer),
        settings=TokenizeSettings.of(settings),
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
