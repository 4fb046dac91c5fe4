"""The scorers of reasoning-gym's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trueup.errors import check_extra
from trueup.rewards.answer_scorer import AnswerScorer
from trueup.rewards.parameters import column_of
from trueup.rewards.samples import text_of


@dataclass(frozen=True)
class ReasoningGym:
    """What a task of reasoning-gym scores the completion with, mostly in [0, 1]; None for a row of no task.

    Rows are those of ``data.reasoning_gym``. The answer is what stands in the last ``<answer>…</answer>``, or without
    one the whole completion. Some of the tasks evaluate the answer as Python (``countdown``, ``n_queens``, …), so that
    scoring is confined as code is. ``confined=false`` does without, for machines where that can't be had and for tasks
    that don't do that. ``seconds``: what takes longer is wrong.

    Raises ``MissingExtraError``, and ``RewardError`` where scoring can't be confined.
    """

    confined: bool = True
    seconds: float = 5.0

    def __post_init__(self) -> None:
        check_extra("reasoning_gym", "reasoning-gym")
        _ = self._scorer

    @cached_property
    def _scorer(self) -> AnswerScorer:
        return AnswerScorer("reasoning-gym", confined=self.confined, seconds=self.seconds)

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        parts = [
            column_of(columns, each, "reasoning-gym") for each in ("task", "task_settings", "task_index", "answer")
        ]
        rows = zip(completions, *parts, strict=True)
        return self._scorer.scores(
            [None if task is None else (text_of(completion), task, *rest) for completion, task, *rest in rows]
        )
