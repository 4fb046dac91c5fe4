"""The table of preference losses, and what they see of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trueup.models.tree import TreeBatch
from trueup.objectives import pointwise, preference, reference_free
from trueup.objectives.logprobs import TokenStatistics, sequence_logprobs
from trueup.records import CompletionGroup
from trueup.trainers.ranked import ranked_mask, ranked_rows
from trueup.trainers.settings import PreferenceSettings


@dataclass(frozen=True)
class Compared:
    """Groups side by side, one row each: ``[N, K]``, best first, zeros where a row has fewer than K completions."""

    logprobs: Tensor
    """Sequence log-probs of the policy."""
    ref_logprobs: Tensor
    log_ratios: Tensor
    """log π/π_ref as the losses see it: by length, under another divergence, where the settings say so."""
    lengths: Tensor
    """Scored tokens of each completion."""
    mask: Tensor
    """bool: where a row has a completion."""
    desirable: Tensor
    """bool: the labels of unpaired data; of a ranking the first."""
    ranked: Tensor
    """bool ``[N]``: whether the row is a ranking."""
    weights: Tensor
    """``[N]``: of each row in the loss."""
    statistics: Mapping[str, Tensor]
    """``[N]`` each: see ``STATISTICS``."""

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.log_ratios[:, 0], self.log_ratios[:, 1]

    @property
    def policy_pair(self) -> tuple[Tensor, Tensor]:
        return self.logprobs[:, 0], self.logprobs[:, 1]

    @property
    def pair_lengths(self) -> dict[str, Tensor]:
        return {"chosen_lengths": self.lengths[:, 0], "rejected_lengths": self.lengths[:, 1]}

    @property
    def chosen_mean_logprobs(self) -> Tensor:
        return self.logprobs[:, 0] / self.lengths[:, 0]

    def summed(self, losses: Tensor) -> Tensor:
        """[N, K] → [N]: the losses of a row's completions together."""
        return (losses * self.mask).sum(-1)


def compare(
    groups: Sequence[CompletionGroup],
    batch: TreeBatch,
    scores: TokenStatistics,
    ref_logprobs: Tensor,
    settings: PreferenceSettings,
    statistics: Mapping[str, Tensor],
) -> Compared:
    """Lay out the token log-probs of a batch, ``[S]``, under policy and reference, by prompt."""
    token_mask = batch.row_mask
    policy, reference = batch.rows(scores.logprobs), batch.rows(ref_logprobs)
    lengths = ranked_rows(token_mask.sum(-1), groups)

    def difference(policy: Tensor, reference: Tensor) -> Tensor:
        log_ratios = ranked_rows(policy - reference, groups)
        log_ratios = log_ratios / lengths.clamp(min=1) if settings.normalize_lengths else log_ratios
        return preference.divergence_rewards(log_ratios, settings.divergence, alpha=settings.divergence_alpha)

    logprobs, ref_sums = sequence_logprobs(policy, token_mask), sequence_logprobs(reference, token_mask)
    log_ratios, weights = difference(logprobs, ref_sums), torch.ones_like(lengths[:, 0], dtype=policy.dtype)
    if settings.length_alpha < 1:
        shorter = lengths.amin(-1, keepdim=True).expand_as(lengths).flatten()
        log_ratios = difference(
            *(
                preference.length_desensitized_logprobs(each, token_mask, shorter, alpha=settings.length_alpha)
                for each in (policy, reference)
            )
        )
    if scores.log_collision is not None:
        own = preference.wpo_weights(policy, token_mask, batch.rows(scores.log_collision))
        weights = ranked_rows(own, groups).prod(-1)
    return Compared(
        logprobs=ranked_rows(logprobs, groups),
        ref_logprobs=ranked_rows(ref_sums, groups),
        log_ratios=log_ratios,
        lengths=lengths,
        mask=ranked_mask(groups, lengths.device),
        desirable=desirable(groups, lengths),
        ranked=torch.tensor([group.desirable is None for group in groups], device=lengths.device),
        weights=weights,
        statistics=statistics,
    )


def joined(parts: Sequence[Compared], order: Sequence[int]) -> Compared:
    """Micro-batches as one; ``order`` says which group of the step each of their rows is."""
    places = sorted(range(len(order)), key=lambda place: order[place])

    def rows(name: str) -> Tensor:
        each = [row for part in parts for row in getattr(part, name)]
        return pad_sequence([torch.atleast_1d(each[place]) for place in places], batch_first=True)

    whole = {each.name: rows(each.name) for each in fields(Compared) if each.name != "statistics"}
    for name in ("weights", "ranked"):
        whole[name] = whole[name].squeeze(1)
    return Compared(**whole, statistics={})


def desirable(groups: Sequence[CompletionGroup], like: Tensor) -> Tensor:
    """bool, of the shape of ``like`` ``[N, K]``: the labels of each group; where it has none, the first is good."""
    labels = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    for row, group in enumerate(groups):
        known = (True,) if group.desirable is None else group.desirable
        labels[row, : len(known)] = torch.tensor(known, device=like.device)
    return labels


Loss = Callable[[Compared, PreferenceSettings], Tensor]
"""One loss for every row: ``[N]``."""

LOSSES: dict[str, Loss] = {
    "dpo": lambda x, s: preference.dpo(*x.pair, beta=s.beta),
    "conservative_dpo": lambda x, s: preference.conservative_dpo(
        *x.pair, beta=s.beta, label_smoothing=s.label_smoothing
    ),
    "robust_dpo": lambda x, s: preference.robust_dpo(*x.pair, beta=s.beta, label_smoothing=s.label_smoothing),
    "ipo": lambda x, s: preference.ipo(*x.pair, beta=s.beta),
    "hinge": lambda x, s: preference.hinge(*x.pair, beta=s.beta),
    "exo": lambda x, s: preference.exo(*x.pair, beta=s.beta, label_smoothing=s.label_smoothing),
    "discopop": lambda x, s: preference.discopop(*x.pair, beta=s.beta, tau=s.discopop_tau),
    "apo_down": lambda x, s: preference.apo_down(*x.pair, beta=s.beta),
    "rpo": lambda x, s: preference.rpo(*x.pair, x.chosen_mean_logprobs, beta=s.beta, alpha=s.alpha),
    "nll": lambda x, s: -x.chosen_mean_logprobs,
    "aot": lambda x, s: preference.aot(
        x.logprobs[:, 0] - x.logprobs[:, 1],
        x.statistics["aot_matched"],
        beta=s.beta,
        label_smoothing=s.label_smoothing,
    ),
    "aot_unpaired": lambda x, s: preference.aot_unpaired(
        *x.pair,
        chosen_matched=x.statistics["aot_chosen_matched"],
        rejected_matched=x.statistics["aot_rejected_matched"],
        beta=s.beta,
        label_smoothing=s.label_smoothing,
    ),
    "kto": lambda x, s: x.summed(
        pointwise.kto(
            x.log_ratios,
            x.desirable,
            kl=_kto_kl(x),
            beta=s.beta,
            desirable_weight=s.desirable_weight,
            undesirable_weight=s.undesirable_weight,
        )
    ),
    "bco": lambda x, s: x.summed(
        pointwise.bco(x.log_ratios, x.desirable, beta=s.beta, shift=x.statistics["bco_shift"][0])
    ),
    "apo_zero": lambda x, s: x.summed(pointwise.apo_zero(x.log_ratios, x.desirable, beta=s.beta)),
    "nca": lambda x, s: x.summed(pointwise.nca(x.log_ratios, x.desirable, beta=s.beta)),
    "sppo": lambda x, s: x.summed(pointwise.sppo(x.log_ratios, x.desirable.to(x.log_ratios), beta=s.beta)),
    "simpo": lambda x, s: reference_free.simpo(*x.policy_pair, **x.pair_lengths, beta=s.beta, margin=s.simpo_margin),
    "orpo": lambda x, s: reference_free.orpo(*x.policy_pair, **x.pair_lengths, coef=s.orpo_coef),
    "cpo": lambda x, s: reference_free.cpo(
        *x.policy_pair,
        chosen_lengths=x.lengths[:, 0],
        beta=s.beta,
        label_smoothing=s.label_smoothing,
        nll_coef=s.alpha,
    ),
    "plackett_luce": lambda x, s: preference.plackett_luce_dpo(
        x.log_ratios, torch.zeros_like(x.log_ratios), beta=s.beta, mask=x.mask
    ),
}


def _kto_kl(x: Compared) -> Tensor:
    # A step of a single prompt has no other's completions to estimate it on.
    return x.statistics["kl"][0] if "kl" in x.statistics else x.logprobs.new_zeros(())


def step_loss(x: Compared, settings: PreferenceSettings) -> Tensor:
    """The losses of the settings, weighed and added up: ``[N]``."""
    weights = settings.loss_weights or (1.0,) * len(settings.loss)
    parts = (weight * LOSSES[name](x, settings) for weight, name in zip(weights, settings.loss, strict=True))
    return x.weights * torch.stack(list(parts)).sum(0)


Statistic = Callable[[Compared, PreferenceSettings], dict[str, Tensor]]

STATISTICS: dict[str, tuple[Literal["step", "mismatched"], Statistic]] = {
    "aot": ("step", lambda x, s: _aot_statistics(x)),
    "aot_unpaired": ("step", lambda x, s: _aot_unpaired_statistics(x)),
    "bco": (
        "step",
        lambda x, s: {"bco_shift": pointwise.bco_shift(x.log_ratios[x.mask], x.desirable[x.mask], beta=s.beta)},
    ),
    "kto": ("mismatched", lambda x, s: {"kl": pointwise.kto_kl(x.log_ratios[x.mask])}),
}
"""What couples a batch: numbers, or one for each row, ``[N]``. Each is computed without gradient over all groups of a
step, or over the mismatched ones (each prompt with another's completions), and given to every micro-batch."""


def _aot_statistics(x: Compared) -> dict[str, Tensor]:
    values, targets = (each[:, 0] - each[:, 1] for each in (x.logprobs, x.ref_logprobs))
    return {"aot_matched": preference.match_ranks(values, targets)}


def _aot_unpaired_statistics(x: Compared) -> dict[str, Tensor]:
    chosen, rejected = x.pair
    return {
        "aot_chosen_matched": preference.match_ranks(chosen, rejected),
        "aot_rejected_matched": preference.match_ranks(-rejected, -chosen),
    }
