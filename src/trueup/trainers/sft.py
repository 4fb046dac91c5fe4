"""Supervised fine-tuning: maximum likelihood of demonstrations.

    maximise  Σ_t log π_θ(y_t | x, y_<t)   over the trained tokens of the demonstrations (x, y)

The mean is over all trained tokens of a step, not a mean of per-row means, so that every token counts the same. Hence
rows of one prompt may share it: as a group they add to the sum what they add apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trueup.data.collate import train_all_tokens
from trueup.models.load import context_length
from trueup.models.scorer import prepare_scorer
from trueup.models.tree import TreeBatch
from trueup.objectives.logprobs import label_smoothed_nll
from trueup.objectives.reduce import token_mean
from trueup.records import CompletionGroup
from trueup.trainers.fit import fit
from trueup.trainers.inputs import load_inputs
from trueup.trainers.samples import sample_writer
from trueup.trainers.session import RunResult, guarded, open_session
from trueup.trainers.settings import SFTSettings
from trueup.trainers.tally import Totals
from trueup.trainers.trained_model import load_trained, save_trained


@guarded
def train_sft(
    settings: SFTSettings, *, model: Any = None, tokenizer: Any = None, data: Any = None, eval_data: Any = None
) -> RunResult:
    """Fine-tune a causal language model on demonstrations.

    ``model`` and ``tokenizer`` (objects), ``data`` and ``eval_data`` (rows, a ``datasets`` object or completion groups)
    take the place of the settings of the same name. Raises ``TrueupError`` for every mistake that the user can mend.
    """
    session = open_session("sft", settings)
    policy, tokenizer = load_trained(settings, model, tokenizer, dropout=True)
    inputs = load_inputs(
        settings,
        tokenizer,
        task="sft",
        data=data,
        eval_data=eval_data,
        say=session.say,
        context_length=context_length(policy),
        trained_as=train_all_tokens if settings.train_on == "all" else lambda group: group,
        share_prompts=settings.share_prompts,
    )
    scorer = prepare_scorer(policy, neftune_alpha=settings.neftune_alpha)
    want = ("vocab_mean_logprobs",) if settings.label_smoothing else ()

    def loss(groups: Sequence[CompletionGroup], batch: TreeBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        scores = scorer(batch, want=want)
        nll = -scores.logprobs
        if not want:
            return token_mean(nll, denominator=totals.tokens), {}
        smoothed = label_smoothed_nll(
            scores.logprobs, scores.vocab_mean_logprobs, label_smoothing=settings.label_smoothing
        )
        return token_mean(smoothed, denominator=totals.tokens), {"nll": nll}

    return fit(
        session,
        inputs,
        scorer,
        loss=loss,
        save_model=lambda folder: save_trained(policy, tokenizer, folder),
        write_samples=sample_writer(session, policy, tokenizer, inputs),
    )
