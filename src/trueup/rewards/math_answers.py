"""Whether an answer in mathematics is the right one."""

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
class MathAnswers:
    r"""1 if math-verify finds the answer in ``column`` to be what the completion says, else 0.

    Of a completion counts what is boxed or said to be the answer, else the last expression or number; of a given
    answer with ``####`` what stands behind it, and without any ``$`` or ``\boxed`` all of it is read as mathematics.
    None where a row has no answer, or none that is mathematics. ``seconds``: what takes longer to compare is wrong.

    Raises ``MissingExtraError``. The comparison is that of the package math-verify.
    """

    column: str = "answer"
    seconds: float = 5.0

    def __post_init__(self) -> None:
        check_extra("math_verify", "math")

    @cached_property
    def _scorer(self) -> AnswerScorer:
        return AnswerScorer("math", confined=False, seconds=self.seconds)

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = column_of(columns, self.column, "math")
        return self._scorer.scores(
            [
                None if answer is None else (text_of(completion), str(answer))
                for completion, answer in zip(completions, answers, strict=True)
            ]
        )
