"""A trained reward model in use: a prompt and completions in, one score per completion out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trueup.data.cells import as_turns
from trueup.data.chat import tokenize_group
from trueup.data.collate import merge_prompts, micro_batches
from trueup.data.report import ReadReport
from trueup.data.settings import TokenizeSettings
from trueup.errors import DataError, ModelError, OutOfMemoryError
from trueup.models.adapters import is_reward_model, plain_model
from trueup.models.heads import load_reward_model
from trueup.models.load import DtypeName, LoadedModel, context_length, model_source, stored_architecture
from trueup.models.score_scale import ScoreScale
from trueup.models.scorer import RewardScorer, prepare_reward_scorer
from trueup.models.tree import tree_batch
from trueup.records import CompletionGroup, Message, RankedCompletions, Text
from trueup.runs.memory import is_out_of_memory


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoringModel:
    """A model with a score head, how text becomes its tokens, and how its scores are read. Made by ``load``."""

    scores_each: ClassVar[Literal["completion", "step"]]

    scorer: RewardScorer
    tokenizer: PreTrainedTokenizerBase
    name: str
    settings: TokenizeSettings
    scale: ScoreScale
    tokens_per_batch: int = 4096
    """Most tokens in one forward pass."""

    @classmethod
    def load(
        cls,
        name: str | Path | LoadedModel,
        *,
        dtype: DtypeName = "auto",
        device: str = "auto",
        settings: TokenizeSettings | None = None,
        tokens_per_batch: int = 4096,
    ) -> Self:
        """A trained model: a folder, a run's folder (its newest checkpoint), a hub name, or a model in memory.

        ``settings``: as in training; ``max_length`` is lowered to the model's context. Raises ``ModelError`` as
        ``load_reward_model`` does, and for a model without a trained score head.
        """
        check_trained(name)
        loaded = load_reward_model(name, dtype=dtype, device=device, scores_each=cls.scores_each)
        settings = settings or TokenizeSettings()
        limit = context_length(loaded.model) or settings.max_length
        return cls(
            scorer=prepare_reward_scorer(loaded.model).eval(),
            tokenizer=loaded.tokenizer,
            name=loaded.name,
            settings=replace(settings, max_length=min(settings.max_length, limit)),
            scale=ScoreScale.of(plain_model(loaded.model).config.to_dict()),
            tokens_per_batch=tokens_per_batch,
        )

    def tokenized(self, example: RankedCompletions, report: ReadReport) -> CompletionGroup | None:
        """The tokens of a row; None, counted in ``report``, for one that can't be scored."""
        return tokenize_group(self.tokenizer, example, self.settings, report)

    def score_groups(self, groups: Sequence[CompletionGroup]) -> list[np.ndarray]:
        """The scores of every group's completions, or of their steps: one float64 [K] or [M] per group, in its order.

        Raises ``OutOfMemoryError``, which says what to lower.
        """
        scores: list[np.ndarray] = [np.empty(0)] * len(groups)
        for micro in micro_batches(groups, self.tokens_per_batch):
            raw = self._raw_scores([groups[index] for index in micro])
            ends = np.cumsum([self._num_scores(groups[index]) for index in micro])
            for index, part in zip(micro, np.split(raw, ends[:-1]), strict=True):
                scores[index] = self.scale(part)
        return scores

    def _num_scores(self, group: CompletionGroup) -> int:
        if self.scores_each == "completion":
            return len(group.completions)
        return sum(len(each.step_ends) for each in group.completions if each.step_ends is not None)

    @torch.no_grad()
    def _raw_scores(self, groups: Sequence[CompletionGroup]) -> np.ndarray:
        """One forward pass: float64 [C] or [M]."""
        try:
            return self.scorer(tree_batch(groups, next(self.scorer.parameters()).device)).double().cpu().numpy()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            num_tokens = sum(group.num_tokens for group in groups)
            lower = "--tokens-per-batch" if len(groups) > 1 else "--max-length"
            raise OutOfMemoryError(
                f"out of memory, with {num_tokens:,} tokens in one pass",
                where=self.name,
                way_out=f"{lower} {max(1, num_tokens // 2)}",
            ) from error


class RewardModel(ScoringModel):
    """A model that scores completions."""

    scores_each = "completion"

    def score(self, prompt: Text | Sequence[Message], completions: Sequence[Text | Sequence[Message]]) -> np.ndarray:
        """The scores of K answers to one prompt: float64 [K].

        ``prompt``: plain text or a conversation; to a conversation an answer may be the text of its next turn. Raises
        ``DataError`` for a prompt or answer that can't be read: empty, or longer than the settings allow.
        """
        report = ReadReport()
        groups = []
        for number, completion in enumerate(completions, start=1):
            example = as_example(prompt, completion, where=f"completion {number}")
            group = self.tokenized(example, report)
            if group is None:
                raise DataError(f"can't be scored: {next(iter(report.dropped))}", where=example.where)
            groups.append(group)
        return np.concatenate([np.empty(0), *self.score_groups(merge_prompts(groups, self.tokens_per_batch))])


def scores_steps(name: str | Path) -> bool:
    """Whether a saved model is a process reward model. Raises ``ModelError`` as ``model_source`` does."""
    config = json.loads((model_source(name) / "config.json").read_text(encoding="utf-8"))
    return config.get("scores_each") == "step"


def check_trained(name: str | Path | LoadedModel) -> None:
    """Raise ``ModelError`` for a model that has no score head: a new one would be drawn at random."""
    if isinstance(name, LoadedModel):
        trained, where = is_reward_model(plain_model(name.model)), name.name
    else:
        trained, where = (
            (stored_architecture(model_source(name)) or "").endswith("ForSequenceClassification"),
            str(name),
        )
    if not trained:
        raise ModelError(
            "is not a reward model: it has no score head",
            where=where,
            way_out=f"train one on it first: trueup reward --model {where} --data PAIRS.jsonl",
        )


def as_example(
    prompt: Text | Sequence[Message], completion: Text | Sequence[Message], where: str = ""
) -> RankedCompletions:
    """A prompt and one answer as a row. To a conversation, a string is the assistant's next turn."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return RankedCompletions(prompt=prompt, completions=(completion,), where=where)
    turns = as_turns(completion, "assistant")
    return RankedCompletions(prompt=as_turns(prompt, "user"), completions=(turns,), where=where)
