"""Reward model: scores whose differences explain what people chose.

1. r_θ(x, y): a linear head on the hidden state of each completion's last token
2. loss  −log σ(r_w − r_l − margin)  for a pair (Bradley–Terry), the Plackett–Luce likelihood for a ranked list
3. mean over the prompts of the step; one optimiser step
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trueup.models.heads import load_reward_model
from trueup.models.load import context_length
from trueup.models.scorer import prepare_reward_scorer
from trueup.models.tree import TreeBatch
from trueup.objectives.preference import reward_model_loss
from trueup.records import CompletionGroup
from trueup.trainers.fit import fit
from trueup.trainers.inputs import load_inputs
from trueup.trainers.process import train_process
from trueup.trainers.ranked import check_ranked, ordered_pairs, outcomes, ranked_mask, ranked_rows
from trueup.trainers.session import RunResult, guarded, open_session
from trueup.trainers.settings import RewardSettings
from trueup.trainers.summary import compared_pairs
from trueup.trainers.tally import Totals
from trueup.trainers.trained_model import load_trained, save_trained


@guarded
def train_reward(
    settings: RewardSettings, *, model: Any = None, tokenizer: Any = None, data: Any = None, eval_data: Any = None
) -> RunResult:
    """Train a reward model on preferences; with ``settings.process`` on answers that are labelled step by step.

    ``model`` and ``tokenizer`` (objects), ``data`` and ``eval_data`` (rows, a ``datasets`` object or completion groups)
    take the place of the settings of the same name. Raises ``TrueupError`` for every mistake that the user can mend.
    """
    if settings.process:
        return train_process(settings, model=model, tokenizer=tokenizer, data=data, eval_data=eval_data)
    session = open_session("reward", settings)
    reward_model, tokenizer = load_trained(
        settings, model, tokenizer, load=partial(load_reward_model, seed=settings.seed)
    )
    inputs = load_inputs(
        settings,
        tokenizer,
        task="preference",
        data=data,
        eval_data=eval_data,
        say=session.say,
        check=check_ranked,
        context_length=context_length(reward_model),
    )
    scorer = prepare_reward_scorer(reward_model)

    def loss(groups: Sequence[CompletionGroup], batch: TreeBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        scores, mask = ranked_rows(scorer(batch), groups), ranked_mask(groups, batch.tokens.device)
        losses = reward_model_loss(
            scores,
            margin=margins(groups, scores) if settings.use_margin else None,
            centering_coef=settings.centering_coef,
            mask=mask,
        )
        return losses.sum() / totals.groups, reward_metrics(scores, mask, groups)

    return fit(
        session,
        inputs,
        scorer,
        loss=loss,
        save_model=lambda folder: save_trained(reward_model, tokenizer, folder),
        summarise=partial(compared_pairs, accuracy="accuracy", score_gap="margin"),
    )


def margins(groups: Sequence[CompletionGroup], like: Tensor) -> Tensor:
    """The margin of every row, 0 where the data has none: ``[N]``."""
    return torch.tensor([group.margin or 0.0 for group in groups], dtype=like.dtype, device=like.device)


def reward_metrics(scores: Tensor, mask: Tensor, groups: Sequence[CompletionGroup]) -> dict[str, Tensor]:
    """TRL's names: how the better and the worse completion of every pair compare, and where the scores lie."""
    lengths = torch.tensor(
        [int(c.completion_mask.sum()) for group in groups for c in group.completions], device=scores.device
    )
    better, worse = ordered_pairs(scores, mask)
    longer, shorter = ordered_pairs(ranked_rows(lengths, groups), mask)
    return {
        "accuracy": outcomes(better, worse),
        "margin": better - worse,
        "mean_reward": scores[mask],
        "length_gap": (longer - shorter).float(),
    }
