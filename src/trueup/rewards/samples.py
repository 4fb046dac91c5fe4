"""What a reward is asked about: sampled completions, each with its prompt and the other columns of its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trueup.errors import DataError
from trueup.records import Text

ARGUMENTS = ("prompts", "completions", "completion_ids")
"""The names under which a reward gets what every sample has."""

SHOWN = 60
"""Characters of a prompt that a message shows."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """N completions, in one order everywhere; those of one prompt repeat it.

    ``prompts`` and ``completions``: plain text, or conversations (a completion then is the turns behind the prompt).
    ``completion_ids``: int64 [T_i], the tokens of the policy's tokenizer, end token included. ``truncated``: whether a
    completion was cut. ``columns``: the other columns of the data, each [N]. ``where``: the row of each, for messages.

    Raises ``DataError`` for parts of other lengths, and for a column that has the name of an argument.
    """

    prompts: list[Text]
    completions: list[Text]
    completion_ids: list[np.ndarray]
    truncated: list[bool]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    where: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = {
            "completions": self.completions,
            "completion_ids": self.completion_ids,
            "truncated": self.truncated,
            **({"where": self.where} if self.where else {}),
            **self.columns,
        }
        for name, part in parts.items():
            if len(part) != len(self.prompts):
                raise DataError(f"{name!r} has {len(part)} entries for {len(self.prompts)} prompts")
        for name in ARGUMENTS:
            if name in self.columns:
                raise DataError(
                    f"the data have a column {name!r}, the name under which a reward gets the samples themselves",
                    way_out="rename the column",
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def only(self, index: int) -> Samples:
        """One of them, by itself."""
        return Samples(
            prompts=[self.prompts[index]],
            completions=[self.completions[index]],
            completion_ids=[self.completion_ids[index]],
            truncated=[self.truncated[index]],
            columns={name: [column[index]] for name, column in self.columns.items()},
            where=self.where[index : index + 1],
        )

    def keywords(self) -> dict[str, Any]:
        """The arguments of a reward: conversations as lists of messages, tokens as lists of integers."""
        return {
            "prompts": [plain(prompt) for prompt in self.prompts],
            "completions": [plain(completion) for completion in self.completions],
            "completion_ids": [[int(token) for token in tokens] for tokens in self.completion_ids],
            **{name: list(column) for name, column in self.columns.items()},
        }

    def place(self, index: int) -> str:
        """How a message names a sample: ``sample 3 (data.jsonl:7, prompt 'What is …')``."""
        row = f"{self.where[index]}, " if self.where and self.where[index] else ""
        return f"sample {index} ({row}prompt {start_of(self.prompts[index])})"


@dataclass(frozen=True, kw_only=True)
class RewardScores:
    """What the rewards say of N samples.

    ``total``: float64 [N], Σ_j w_j · r_ij over the rewards that apply to sample i. ``each``: of every reward by name
    float64 [N], NaN where it doesn't apply. From a process reward model: ``steps``, of each sample float64 [M_i], the
    probability that a step is right; ``step_ends``: int64 [M_i], the index of the step's last token in
    ``completion_ids``.
    """

    total: np.ndarray
    each: dict[str, np.ndarray]
    steps: list[np.ndarray] | None = None
    step_ends: list[np.ndarray] | None = None

    def of_groups(self, size: int) -> list[RewardScores]:
        """The same, cut into groups of ``size`` samples each."""
        return [self._cut(slice(start, start + size)) for start in range(0, len(self.total), size)]

    def _cut(self, part: slice) -> RewardScores:
        return RewardScores(
            total=self.total[part],
            each={name: scores[part] for name, scores in self.each.items()},
            steps=None if self.steps is None else self.steps[part],
            step_ends=None if self.step_ends is None else self.step_ends[part],
        )

    @classmethod
    def joined(cls, parts: Sequence[RewardScores]) -> RewardScores:
        """What the same rewards say of several batches of samples, one behind the other."""
        steps = [each for part in parts for each in part.steps or ()]
        step_ends = [each for part in parts for each in part.step_ends or ()]
        return cls(
            total=np.concatenate([part.total for part in parts]),
            each={name: np.concatenate([part.each[name] for part in parts]) for name in parts[0].each},
            steps=steps if parts[0].steps is not None else None,
            step_ends=step_ends if parts[0].step_ends is not None else None,
        )


@dataclass(frozen=True, kw_only=True)
class StepScores:
    """What a process reward model gives in place of a list of scores; parts as in ``RewardScores``."""

    scores: list[float | None]
    steps: list[np.ndarray]
    step_ends: list[np.ndarray]


def plain(text: Text | Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    """A text as a reward gets it: a string, or a list of messages."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def text_of(completion: Text | Sequence[Mapping[str, Any]]) -> str:
    """What a completion says: plain text itself, of a conversation what the assistant's turns say, line by line."""
    if isinstance(completion, str):
        return completion
    turns = (turn.get("content") for turn in completion if turn.get("role", "assistant") == "assistant")
    return "\n".join(map(_content, turns))


def _content(content: Any) -> str:
    """A turn's content: a string, or parts of which some are text."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return content or ""


def start_of(prompt: Text) -> str:
    """The first characters of a prompt, of a conversation those of its last turn, quoted."""
    text = prompt if isinstance(prompt, str) else _content(prompt[-1].get("content")) if prompt else ""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")
