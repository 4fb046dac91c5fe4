"""Trained models as reward functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trueup.data.collate import merge_prompts
from trueup.data.report import ReadReport
from trueup.errors import DataError, RewardError, SettingsError
from trueup.records import CompletionGroup
from trueup.rewards.process_reward_model import ProcessRewardModel, steps_of
from trueup.rewards.reward_model import RewardModel, as_example
from trueup.rewards.samples import StepScores


class ModelFunction:
    """A reward model. Completions that follow each other and have one prompt share it."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        merged: list[CompletionGroup] = []
        pairs = enumerate(zip(prompts, completions, strict=True))
        for _, run in groupby(pairs, key=lambda pair: pair[1][0]):
            groups = [self._group(prompt, completion, index) for index, (prompt, completion) in run]
            merged += merge_prompts(groups, self.model.tokens_per_batch)
        return np.concatenate([np.empty(0), *self.model.score_groups(merged)]).tolist()

    def _group(self, prompt: Any, completion: Any, index: int) -> CompletionGroup:
        report = ReadReport()
        group = self.model.tokenized(as_example(prompt, completion), report)
        if group is None:
            raise RewardError(f"can't be scored: {next(iter(report.dropped))}", sample=index)
        return group


class StepFunction:
    """A process reward model: ``StepScores``, whose score of a completion is that of its worst step.

    An answer's steps are what stands between the model's ``step_separator``; where they end is found in the tokens of
    the policy's ``tokenizer``. A completion without a step has the score 0. Source of the minimum: Wang et al. 2023
    (arXiv 2312.08935), section 3.4.
    """

    def __init__(self, model: ProcessRewardModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is None:
            raise SettingsError(
                f"{model.name} scores steps, and where they end is a matter of the policy's tokenizer",
                where="--reward",
                way_out="give Rewards.load the policy's tokenizer",
            )
        self.model, self.tokenizer = model, tokenizer

    def __call__(
        self, *, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> StepScores:
        texts = [decoded(self.tokenizer, tokens) for tokens in completion_ids]
        found = [steps_of(text, self.model.settings.step_separator) for text in texts]
        asked = [index for index, (steps, _) in enumerate(found) if steps]
        try:
            scored = self.model.step_probabilities(
                [prompts[index] for index in asked], [found[index][0] for index in asked]
            )
        except DataError as error:
            raise RewardError(error.what, sample=asked[int(error.where or 0)], way_out=error.way_out) from error
        steps = [np.empty(0) for _ in texts]
        ends = [np.empty(0, dtype=np.int64) for _ in texts]
        for index, each in zip(asked, scored, strict=True):
            steps[index] = each
            ends[index] = token_ends(self.tokenizer, completion_ids[index], texts[index], found[index][1][: len(each)])
        return StepScores(
            scores=[float(each.min()) if len(each) else 0.0 for each in steps], steps=steps, step_ends=ends
        )


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def token_ends(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], text: str, ends: Sequence[int]) -> np.ndarray:
    """int64 [M]: for each end in ``text``, the decoded ``tokens``, the index of the token that completes it.

    Found by halving: the text of the first t tokens grows with t, whatever the tokenizer does at its boundaries.
    """
    found = []
    low = 0
    for end in ends:
        high = len(tokens) - 1
        while low < high:
            middle = (low + high) // 2
            if decoded(tokenizer, tokens[: middle + 1]).startswith(text[:end]):
                high = middle
            else:
                low = middle + 1
        found.append(low)
    return np.array(found, dtype=np.int64)
