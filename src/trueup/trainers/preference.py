"""Preference optimisation: DPO and its family, on pairs and on ranked lists.

DPO as its paper has it, for a step of pairs (x, y_w, y_l):

    1. log π_θ(y | x) and log π_ref(y | x) of both completions
    2. implicit rewards  r̂ = β (log π_θ − log π_ref)
    3. loss  −log σ(r̂_w − r̂_l),  mean over the pairs
    4. one optimiser step on θ; π_ref stays

The other losses change line 3 only: ``LOSSES`` is the table.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trueup.errors import ModelError, SettingsError
from trueup.models.adapters import reference_mode
from trueup.models.load import context_length, load_model
from trueup.models.scorer import Scorer, prepare_scorer
from trueup.models.tree import TreeBatch
from trueup.objectives import preference as objectives
from trueup.objectives import reference_free
from trueup.objectives.logprobs import sequence_logprobs
from trueup.records import CompletionGroup
from trueup.trainers.fit import fit
from trueup.trainers.inputs import is_tokenized, load_inputs
from trueup.trainers.ranked import check_ranked, ordered_pairs, outcomes, ranked_mask, ranked_rows
from trueup.trainers.samples import write_samples
from trueup.trainers.session import RunResult, guarded, open_session
from trueup.trainers.settings import REFERENCE_FREE, PreferenceSettings, SFTSettings, TrainSettings
from trueup.trainers.sft import train_sft
from trueup.trainers.tally import Totals
from trueup.trainers.trained_model import load_trained, save_trained


@dataclass(frozen=True)
class Compared:
    """What a loss sees of a step: sequence log-probs of the policy and of the reference, ``[N, K]``, best first."""

    logprobs: Tensor
    ref_logprobs: Tensor
    lengths: Tensor
    """Scored tokens of each completion."""
    mask: Tensor
    """Where a row has a completion."""

    @property
    def policy_pair(self) -> tuple[Tensor, Tensor]:
        return self.logprobs[:, 0], self.logprobs[:, 1]

    @property
    def log_ratio_pair(self) -> tuple[Tensor, Tensor]:
        log_ratios = self.logprobs - self.ref_logprobs
        return log_ratios[:, 0], log_ratios[:, 1]

    @property
    def chosen_mean_logprobs(self) -> Tensor:
        return self.logprobs[:, 0] / self.lengths[:, 0]

    @property
    def pair_lengths(self) -> dict[str, Tensor]:
        return {"chosen_lengths": self.lengths[:, 0], "rejected_lengths": self.lengths[:, 1]}


Loss = Callable[[Compared, PreferenceSettings], Tensor]

LOSSES: dict[str, Loss] = {
    "dpo": lambda x, s: objectives.dpo(*x.log_ratio_pair, beta=s.beta),
    "conservative_dpo": lambda x, s: objectives.conservative_dpo(
        *x.log_ratio_pair, beta=s.beta, label_smoothing=s.label_smoothing
    ),
    "robust_dpo": lambda x, s: objectives.robust_dpo(*x.log_ratio_pair, beta=s.beta, label_smoothing=s.label_smoothing),
    "ipo": lambda x, s: objectives.ipo(*x.log_ratio_pair, beta=s.beta),
    "hinge": lambda x, s: objectives.hinge(*x.log_ratio_pair, beta=s.beta),
    "rpo": lambda x, s: objectives.rpo(*x.log_ratio_pair, x.chosen_mean_logprobs, beta=s.beta, alpha=s.alpha),
    "simpo": lambda x, s: reference_free.simpo(*x.policy_pair, **x.pair_lengths, beta=s.beta, margin=s.simpo_margin),
    "orpo": lambda x, s: reference_free.orpo(*x.policy_pair, **x.pair_lengths, coef=s.orpo_coef),
    "plackett_luce": lambda x, s: objectives.plackett_luce_dpo(x.logprobs, x.ref_logprobs, beta=s.beta, mask=x.mask),
}


@guarded
def train_preference(
    settings: PreferenceSettings, *, model: Any = None, tokenizer: Any = None, data: Any = None, eval_data: Any = None
) -> RunResult:
    """Fit a causal language model to preferences.

    ``model`` and ``tokenizer`` (objects), ``data`` and ``eval_data`` (rows, a ``datasets`` object or completion groups)
    take the place of the settings of the same name. Raises ``TrueupError`` for every mistake that the user can mend.
    """
    session = open_session("preference", settings)
    if settings.fit_reference:
        # Both fits read the data.
        data, eval_data = (list(each) if isinstance(each, Iterator) else each for each in (data, eval_data))
        model, tokenizer = fit_reference(settings, model, tokenizer, data, eval_data)
    policy, tokenizer = load_trained(settings, model, tokenizer)
    inputs = load_inputs(
        settings,
        tokenizer,
        task="preference",
        data=data,
        eval_data=eval_data,
        say=session.say,
        check=check_ranked if settings.loss == "plackett_luce" else check_pair,
        context_length=context_length(policy),
    )
    scorer = prepare_scorer(policy)
    reference = reference_logprobs(settings, policy, scorer, tokenizer)

    def loss(groups: Sequence[CompletionGroup], batch: TreeBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        def by_prompt(logprobs: Tensor) -> Tensor:
            return ranked_rows(sequence_logprobs(batch.rows(logprobs), batch.row_mask), groups)

        compared = Compared(
            logprobs=by_prompt(scorer(batch).logprobs),
            ref_logprobs=by_prompt(reference(batch)),
            lengths=ranked_rows(batch.row_mask.sum(-1), groups),
            mask=ranked_mask(groups, batch.tokens.device),
        )
        losses = LOSSES[settings.loss](compared, settings)
        return losses.sum() / totals.groups, preference_metrics(compared, settings)

    return fit(
        session,
        inputs,
        scorer,
        loss=loss,
        save_model=lambda folder: save_trained(policy, tokenizer, folder),
        write_samples=lambda step: write_samples(session, policy, tokenizer, inputs, step),
        accuracy="rewards/accuracies",
    )


def check_pair(group: CompletionGroup) -> None:
    """Raise ``TrueupError`` for a group that is no pair."""
    check_ranked(group)
    if len(group.completions) > 2:
        raise SettingsError(
            "this loss compares pairs, and this row ranks more than two completions",
            where=group.where or "--loss",
            way_out="--loss plackett_luce takes ranked lists",
        )


def preference_metrics(compared: Compared, settings: PreferenceSettings) -> dict[str, Tensor]:
    """TRL's names: implicit rewards of the better and the worse completion of every pair, and how they compare.

    The reward of a loss without reference is β times the *mean* log-prob of a token, which is what it compares.
    """
    per_token = compared.lengths.clamp(min=1) if settings.loss in REFERENCE_FREE else 1
    rewards = objectives.implicit_rewards(compared.logprobs / per_token, compared.ref_logprobs, beta=settings.beta)
    chosen, rejected = ordered_pairs(rewards, compared.mask)
    chosen_logps, rejected_logps = ordered_pairs(compared.logprobs, compared.mask)
    chosen_lengths, rejected_lengths = ordered_pairs(compared.lengths, compared.mask)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": outcomes(chosen, rejected),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        "length_gap": (chosen_lengths - rejected_lengths).float(),
    }


def reference_logprobs(
    settings: PreferenceSettings, policy: nn.Module, scorer: Scorer, tokenizer: PreTrainedTokenizerBase
) -> Callable[[TreeBatch], Tensor]:
    """How log π_ref is found: not at all, from a model of its own, with the adapter off, or from a frozen copy.

    Raises ``ModelError`` for a reference that reads the tokens otherwise than the policy.
    """
    if settings.loss in REFERENCE_FREE:
        return lambda batch: torch.zeros_like(batch.targets, dtype=torch.float32)
    if settings.reference is None and settings.lora_rank > 0:

        def adapter_off(batch: TreeBatch) -> Tensor:
            with torch.no_grad(), reference_mode(policy):
                return scorer(batch).logprobs

        return adapter_off
    if settings.reference is None:
        frozen = copy.deepcopy(scorer)
    else:
        loaded = load_model(settings.reference, dtype=settings.dtype, device=settings.device)
        if loaded.tokenizer.get_vocab().items() ^ tokenizer.get_vocab().items():
            raise ModelError(
                "its tokens are not those of the policy, so the same numbers mean other texts",
                where=settings.reference,
                way_out="take a reference with the policy's tokenizer",
            )
        frozen = prepare_scorer(loaded.model)
    frozen.requires_grad_(False).eval()

    def from_copy(batch: TreeBatch) -> Tensor:
        with torch.no_grad():
            return frozen(batch).logprobs

    return from_copy


def fit_reference(
    settings: PreferenceSettings, model: Any, tokenizer: Any, data: Any, eval_data: Any
) -> tuple[Any, Any]:
    """π_ref = argmax_π E log π(y_w | x): fine-tune on the chosen completions (DPO paper, section 4).

    Needed where the policy that sampled the pairs is unknown: it brings the reference close to the data. Its run lies
    in the folder ``reference`` of this run; a resumed run takes it from there.
    """
    if is_tokenized(data):
        data = [dataclasses.replace(group, completions=group.completions[:1], margin=None) for group in data]
    if is_tokenized(eval_data):
        eval_data = [dataclasses.replace(group, completions=group.completions[:1], margin=None) for group in eval_data]
    shared = {field.name: getattr(settings, field.name) for field in dataclasses.fields(TrainSettings)}
    changed = {
        "output": str(Path(settings.output) / "reference"),
        "num_epochs": settings.fit_epochs,
        "learning_rate": settings.fit_learning_rate,
        # The rest is SFT's own: what suits DPO (a long warm-up, RMSprop, a loose clip) does not suit a likelihood.
        **{
            name: getattr(SFTSettings(), name) for name in ("optimizer", "warmup_steps", "lr_schedule", "max_grad_norm")
        },
        "resume": "no" if settings.resume == "no" else "auto",
    }
    fitted = train_sft(
        SFTSettings(**(shared | changed)), model=model, tokenizer=tokenizer, data=data, eval_data=eval_data
    )
    loaded = load_model(str(fitted.model_folder), dtype=settings.dtype, device=settings.device)
    return loaded.model, loaded.tokenizer
