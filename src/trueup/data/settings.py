"""Settings of how text becomes tokens. Free of torch, for the commands that inherit them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trueup.runs.settings import ESCAPED, check_choices, check_range


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How prompts are read: what everything that tokenises has in common."""

    max_prompt_length: int | None = None
    """Most tokens in a prompt; by default only the longest text that is allowed, or can be read, counts."""
    overlong_prompt: Literal["drop", "keep_end"] = "drop"
    """What to do with a prompt that is too long: drop its row, or keep the prompt's end. Both are counted."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: plain (Human: / Assistant:), a Jinja template, or its file."""
    wrap_text: bool = False
    """Put plain prompts and completions into chat turns, so that the chat template applies."""
    special_tokens_in_text: Literal["plain", "token"] = "plain"
    """What '<|im_end|>' and the like are inside data: plain text, or the token itself. Choose token only for data you
    trust, where a template was applied beforehand: such text can end a turn and open another."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "max_prompt_length", at_least=1)


@dataclass(frozen=True, kw_only=True)
class TextSettings(PromptSettings):
    """How long text may be, and how it is read."""

    max_length: int = 1024
    """Most tokens in prompt + completion; a longer completion is cut, and its end is then not trained."""
    overlong_completion: Literal["cut", "drop"] = "cut"
    """What to do with a completion that is too long: cut it, or drop its row. Both are counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "max_length", at_least=2)  # a token of the prompt, one of the completion
        check_range(self, "max_prompt_length", at_least=1, below=self.max_length)


@dataclass(frozen=True, kw_only=True)
class TokenizeSettings(TextSettings):
    """How text becomes tokens."""

    train_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns are trained where a demonstration holds several: all, or the last one."""
    step_separator: str = field(default="\n", metadata=ESCAPED)
    r"""What stands between the labelled steps of an answer: by default a line break. Write \n for one, \t for a tab."""

    @classmethod
    def of(cls, settings: PromptSettings, **changes: Any) -> TokenizeSettings:
        """What ``settings`` say about it, among other things; of what they don't, the defaults."""
        known = {name: getattr(settings, name) for name in (f.name for f in fields(cls)) if hasattr(settings, name)}
        return cls(**(known | changes))

    @property
    def prompt_limit(self) -> int:
        return self.max_length - 1 if self.max_prompt_length is None else self.max_prompt_length
