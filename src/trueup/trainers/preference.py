"""Preference optimisation: DPO and its family, on pairs and on ranked lists.

DPO as its paper has it, for a step of pairs (x, y_w, y_l):

    1. log π_θ(y | x) and log π_ref(y | x) of both completions
    2. implicit rewards  r̂ = β (log π_θ − log π_ref)
    3. loss  −log σ(r̂_w − r̂_l),  mean over the pairs
    4. one optimiser step on θ; π_ref stays

The other losses change line 3 only: ``losses.LOSSES`` is the table. Some need to know the whole step before its first
micro-batch (KTO's reference point, AOT's ranks): ``losses.STATISTICS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueup.data.collate import micro_batches
from trueup.errors import SettingsError
from trueup.models.load import context_length, load_model
from trueup.models.scorer import prepare_scorer
from trueup.models.tree import TreeBatch, tree_batch
from trueup.objectives.preference import implicit_rewards
from trueup.records import Completion, CompletionGroup
from trueup.trainers.fit import fit
from trueup.trainers.inputs import Inputs, is_tokenized, load_inputs
from trueup.trainers.losses import STATISTICS, Compared, compare, joined, step_loss
from trueup.trainers.ranked import check_ranked, ordered_pairs, outcomes
from trueup.trainers.reference import reference_logprobs
from trueup.trainers.samples import sample_writer
from trueup.trainers.session import RunResult, guarded, open_session
from trueup.trainers.settings import PER_TOKEN, PreferenceSettings, SFTSettings, TrainSettings
from trueup.trainers.sft import train_sft
from trueup.trainers.summary import compared_pairs
from trueup.trainers.tally import Totals
from trueup.trainers.trained_model import load_trained, save_trained


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
        check=check_for(settings),
        context_length=context_length(policy),
    )
    scorer = prepare_scorer(policy)
    partners, asked = groups_asked(settings, inputs)
    reference, fingerprints = reference_logprobs(settings, scorer, tokenizer, asked, say=session.say)
    device = next(scorer.parameters()).device
    want = ("log_collision",) if settings.weight_by_policy else ()

    def compared(
        groups: Sequence[CompletionGroup], batch: TreeBatch, statistics: Mapping[str, Tensor] | None = None
    ) -> Compared:
        scores = scorer(batch, want=want)
        return compare(groups, batch, scores, reference(groups, batch), settings, statistics or {})

    def loss(groups: Sequence[CompletionGroup], batch: TreeBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        x = compared(groups, batch, totals.statistics)
        return step_loss(x, settings).sum() / totals.groups, preference_metrics(x, settings)

    def statistics(groups: Sequence[CompletionGroup]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for of, statistic in (STATISTICS[name] for name in settings.loss if name in STATISTICS):
            over = partners(groups) if of == "mismatched" else groups
            if over:
                found |= statistic(whole_step(over, compared, settings.tokens_per_batch, device), settings)
        return {name: values.expand(len(groups)) for name, values in found.items()}

    return fit(
        session,
        inputs,
        scorer,
        loss=loss,
        save_model=lambda folder: save_trained(policy, tokenizer, folder),
        write_samples=sample_writer(session, policy, tokenizer, inputs),
        summarise=partial(compared_pairs, accuracy="rewards/accuracies"),
        statistics=statistics if set(settings.loss) & set(STATISTICS) else None,
        fingerprints=fingerprints,
    )


def check_for(settings: PreferenceSettings) -> Callable[[CompletionGroup], None]:
    """What every group of the data must be for these losses."""
    if settings.needs_pairs:
        return check_pair
    return check_ranked if "plackett_luce" in settings.loss else check_judged


def check_pair(group: CompletionGroup) -> None:
    """Raise ``TrueupError`` for a group that is no pair."""
    check_ranked(group)
    if len(group.completions) > 2:
        raise SettingsError(
            "this loss compares pairs, and this row ranks more than two completions",
            where=group.where or "--loss",
            way_out="--loss plackett_luce takes ranked lists",
        )


def check_judged(group: CompletionGroup) -> None:
    """Raise ``TrueupError`` for a group that neither is a pair nor has labels."""
    if group.desirable is None:
        check_pair(group)


def preference_metrics(x: Compared, settings: PreferenceSettings) -> dict[str, Tensor]:
    """TRL's names: implicit rewards of the better and the worse completion of every pair, and how they compare; of
    unpaired data those of the desirable and the undesirable completions.

    The reward of a loss that compares *mean* log-probs of a token, without reference, is β times that mean.
    """
    per_token = x.lengths.clamp(min=1) if set(settings.loss) <= set(PER_TOKEN) else 1
    zero = torch.zeros_like(x.log_ratios)
    rewards = implicit_rewards(x.log_ratios / per_token, zero, beta=settings.beta).detach()
    pairs = x.mask & x.ranked[:, None]

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        better, worse = ordered_pairs(values, pairs)
        single = x.mask & ~x.ranked[:, None]
        return torch.cat([better, values[single & x.desirable]]), torch.cat([worse, values[single & ~x.desirable]])

    (better, worse), lengths = ordered_pairs(rewards, pairs), ordered_pairs(x.lengths, pairs)
    (chosen, rejected), (chosen_logps, rejected_logps) = sides(rewards), sides(x.logprobs)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": better - worse,
        "rewards/accuracies": outcomes(better, worse),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        "length_gap": (lengths[0] - lengths[1]).float(),
    }
    if settings.weight_by_policy:
        metrics["weight"] = x.weights
    return metrics | {name: x.statistics[name] for name in ("kl", "bco_shift") if name in x.statistics}


def groups_asked(settings: PreferenceSettings, inputs: Inputs) -> tuple[Partners, list[CompletionGroup] | None]:
    """The mismatched group of each group, and every group that the reference will be asked for: None where that is not
    known (a stream), or not wanted in advance."""
    if inputs.groups is None:
        return partial(mismatched, max_length=inputs.max_length), None
    pools = groups_seen(inputs), inputs.held_out
    partners, asked = partners_within(pools, inputs.max_length), [*pools[0], *pools[1]]
    if "kto" in settings.loss:
        asked += partners(asked)
    return partners, asked if settings.cache_reference else None


def groups_seen(inputs: Inputs) -> list[CompletionGroup]:
    """The training groups that the steps of a run ask for, in the order of the data."""
    seen = {id(group) for _, _, groups in inputs.steps(0) for group in groups}
    return [group for group in inputs.groups or () if id(group) in seen]


def mismatched(groups: Sequence[CompletionGroup], max_length: int) -> list[CompletionGroup]:
    """Every prompt with the completions of the next group, the last with those of the first: what KTO estimates its
    reference point on. Completions are cut where prompt and completion together are too long; a single group has no
    other, and gives none.
    """
    if len(groups) < 2:
        return []
    return [
        dataclasses.replace(
            group,
            completions=tuple(shortened(each, max_length - len(group.prompt)) for each in other.completions),
            desirable=other.desirable,
        )
        for group, other in zip(groups, (*groups[1:], groups[0]), strict=True)
    ]


def shortened(completion: Completion, room: int) -> Completion:
    mask = None if completion.mask is None else completion.mask[:room]
    return dataclasses.replace(completion, tokens=completion.tokens[:room], mask=mask, sampler_logprobs=None)


Partners = Callable[[Sequence[CompletionGroup]], list[CompletionGroup]]


def partners_within(pools: Sequence[Sequence[CompletionGroup]], max_length: int) -> Partners:
    """The mismatched group of each group, the same in every step: so its reference can be known in advance."""
    pairs = ((group, other) for pool in pools for group, other in zip(pool, mismatched(pool, max_length), strict=False))
    known = {id(group): (group, other) for group, other in pairs}
    return lambda groups: [known[id(group)][1] for group in groups if id(group) in known]


def whole_step(
    groups: Sequence[CompletionGroup], compared: Callable[..., Compared], tokens_per_batch: int, device: torch.device
) -> Compared:
    """All groups of a step side by side, without gradient."""
    cut = micro_batches(groups, tokens_per_batch)
    parts = []
    with torch.no_grad():
        for micro in cut:
            chosen = [groups[index] for index in micro]
            parts.append(compared(chosen, tree_batch(chosen, device)))
    return joined(parts, order=[index for micro in cut for index in micro])


def demonstrations(groups: Sequence[CompletionGroup]) -> list[CompletionGroup]:
    """The best completion of every ranking, and every desirable one."""
    return [
        dataclasses.replace(group, completions=(completion,), margin=None, desirable=None)
        for group in groups
        for completion, good in zip(group.completions, group.desirable or (True,), strict=False)
        if good
    ]


def fit_reference(
    settings: PreferenceSettings, model: Any, tokenizer: Any, data: Any, eval_data: Any
) -> tuple[Any, Any]:
    """π_ref = argmax_π E log π(y_w | x): fine-tune on the chosen completions (DPO paper, section 4).

    Needed where the policy that sampled the pairs is unknown: it brings the reference close to the data. Its run lies
    in the folder ``reference`` of this run; a resumed run takes it from there.
    """
    data, eval_data = (demonstrations(each) if is_tokenized(each) else each for each in (data, eval_data))
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
