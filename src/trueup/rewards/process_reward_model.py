"""A trained process reward model in use: a prompt and the steps of an answer in, a probability for each step out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from scipy.special import expit

from trueup.data.cells import as_turns
from trueup.data.report import ReadReport
from trueup.errors import DataError
from trueup.records import CompletionGroup, RankedCompletions, Text
from trueup.rewards.reward_model import ScoringModel


class ProcessRewardModel(ScoringModel):
    """A model that scores the steps of completions, each at its end."""

    scores_each = "step"

    def step_probabilities(self, prompts: Sequence[Text], steps: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Of each answer, given as its steps, how probable each step is to be right: float64 [M_i], σ of the scores.

        Steps beyond ``max_length`` get none. Raises ``DataError`` for an answer that can't be read, its index in
        ``where``.
        """
        groups = [
            self._group(prompt, each, index) for index, (prompt, each) in enumerate(zip(prompts, steps, strict=True))
        ]
        return [expit(scores) for scores in self.score_groups(groups)]

    def _group(self, prompt: Text, steps: Sequence[str], index: int) -> CompletionGroup:
        text = self.settings.step_separator.join(steps)
        completion = text if isinstance(prompt, str) else as_turns(text, "assistant")
        prompt = prompt if isinstance(prompt, str) else as_turns(prompt, "user")
        report = ReadReport()
        example = RankedCompletions(prompt=prompt, completions=(completion,), steps=(tuple(steps),), where=str(index))
        group = self.tokenized(example, report)
        if group is None:
            raise DataError(f"can't be scored: {next(iter(report.dropped))}", where=str(index))
        return group


def steps_of(text: str, separator: str) -> tuple[list[str], list[int]]:
    """The steps of a text, without those that are white space, and where in it each ends (its last character + 1)."""
    parts = text.split(separator)
    starts = accumulate((len(part) + len(separator) for part in parts[:-1]), initial=0)
    found = [
        (part.strip(), start + len(part.rstrip())) for part, start in zip(parts, starts, strict=True) if part.strip()
    ]
    return [step for step, _ in found], [end for _, end in found]
