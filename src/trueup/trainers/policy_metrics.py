"""What an online run reports of itself, under TRL's names where TRL has them, and when it raises an alarm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trueup.objectives import divergence, reduce
from trueup.objectives.value import explained_variance
from trueup.records import StopReason
from trueup.rewards.samples import RewardScores
from trueup.trainers.algorithms import Learned
from trueup.trainers.experience import Experience, first_tokens
from trueup.trainers.policy_settings import PolicySettings


def rollout_metrics(x: Experience, scored: RewardScores) -> dict[str, float]:
    """What was sampled and how it scored: ``scored``, as the rewards gave it."""
    lengths = x.mask.sum(-1).float()
    ended = lengths[~x.truncated]
    spread = x.scores.amax(-1) - x.scores.amin(-1)
    metrics = {
        **mean_and_std("reward", "reward_std", scored.total),
        # A completion without siblings is compared with others.
        **({"frac_reward_zero_std": (spread == 0).float().mean().item()} if x.group_size > 1 else {}),
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": x.truncated.float().mean().item(),
        # Minus the mean log-prob of what was sampled is an unbiased estimate of the entropy per token, for nothing.
        "entropy": -(x.sampler_logprobs.sum() / x.mask.sum()).item(),
    }
    for name, length in (("mean", torch.mean), ("min", torch.min), ("max", torch.max)):
        metrics[f"completions/{name}_terminated_length"] = length(ended).item() if len(ended) else 0.0
    for name, scores in scored.each.items():
        said = scores[~np.isnan(scores)]
        if len(said):
            metrics |= mean_and_std(f"rewards/{name}/mean", f"rewards/{name}/std", said)
    if x.values is not None and x.returns is not None:
        metrics |= critic_metrics(x) | {"objective/scores": metrics["reward"]}
    return metrics


def mean_and_std(mean: str, std: str, values: np.ndarray) -> dict[str, float]:
    """Of all values together, the sample's standard deviation as TRL has it; 0 of a single one."""
    return {mean: float(values.mean()), std: float(values.std(ddof=1)) if len(values) > 1 else 0.0}


def critic_metrics(x: Experience) -> dict[str, float]:
    """How much of the returns' variance the critic explained before it learned from them, and what PPO's trainers
    have always reported."""
    assert x.values is not None
    assert x.returns is not None
    ends = [completion.stop_reason is StopReason.END for group in x.groups for completion in group.completions]
    return {
        "explained_variance": explained_variance(x.values[x.mask], x.returns[x.mask]).item(),
        "objective/rlhf_reward": x.totals.mean().item(),
        "objective/non_score_reward": (x.totals - x.scores).mean().item(),
        "val/num_eos_tokens": float(sum(ends)),
    }


@torch.no_grad()
def learning_metrics(x: Learned, sampler_logprobs: Tensor, settings: PolicySettings) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled, from the sampler and from the reference: a value per token, or
    per completion; of those that were computed, see ``not_clipped``."""
    mask, ratio = x.mask, x.ratio
    counted = first_tokens(mask) if x.whole_ratio else mask
    below = ((ratio < 1 - settings.clip_low) & (x.advantages < 0))[counted]
    above = ((ratio > 1 + settings.clip_high) & (x.advantages > 0))[counted]
    gap = (x.old_logprobs - sampler_logprobs)[mask]
    metrics = {
        "clip_ratio/low_mean": below.float(),
        "clip_ratio/high_mean": above.float(),
        "clip_ratio/region_mean": (below | above).float(),
        "approx_kl": divergence.k3_of_old(x.logprobs, x.old_logprobs)[mask],
        "sampling/sampling_logp_difference/mean": gap.abs(),
        "sampling/importance_sampling_ratio/mean": gap.exp(),
    }
    if x.ref_logprobs is not None:
        metrics["kl"] = divergence.k3(x.logprobs, x.ref_logprobs)[mask]
        metrics["objective/kl"] = reduce.sequence_sum(divergence.k1(x.logprobs, x.ref_logprobs), mask)
    if x.entropy is not None:
        metrics["policy/entropy_avg"] = x.entropy[mask]
    return metrics


def not_clipped(x: Experience, rows: Sequence[int], *, whole_ratio: bool) -> dict[str, Tensor]:
    """What completions add to the metrics that were left out because their advantages are 0: nothing of them is
    clipped."""
    left_out = x.learned[list(rows)]
    none = x.rewards.new_zeros(int((first_tokens(left_out) if whole_ratio else left_out).sum()))
    return {f"clip_ratio/{name}_mean": none for name in ("low", "high", "region")}


FORGOTTEN = 20
"""Rollouts without an alarm after which it is news again."""


@dataclass
class Alarms:
    """Tells once when a run goes wrong in one of the ways that runs go wrong, and again when it does so anew, not
    whenever a metric that wavers about a threshold crosses it.

    Part of every checkpoint: plain numbers only.
    """

    first: dict[str, float] = field(default_factory=dict)
    """The first rollout's metrics that later ones are compared with."""
    on: dict[str, bool] = field(default_factory=dict)
    quiet: dict[str, int] = field(default_factory=dict)
    """Rollouts since each alarm last rang."""

    def heard(self, metrics: Mapping[str, float]) -> list[str]:
        """What to say after this rollout; ``metrics`` are those of its record."""
        for name in ("entropy", "completions/mean_length"):
            if name in metrics:
                self.first.setdefault(name, metrics[name])
        texts = {}
        for name, (rings, text) in ALARMS.items():
            ringing = rings(metrics, self.first)
            if ringing and self.quiet.get(name, FORGOTTEN) >= FORGOTTEN:
                texts[name] = text
            self.on[name] = ringing
            self.quiet[name] = 0 if ringing else self.quiet.get(name, FORGOTTEN) + 1
        return [f"alarm, {name}: {text}" for name, text in texts.items()]

    @property
    def metrics(self) -> dict[str, float]:
        """1 for every alarm that is on."""
        return {f"alarms/{name.replace(' ', '_')}": 1.0 for name, on in self.on.items() if on}


def _collapsed(metrics: Mapping[str, float], first: Mapping[str, float]) -> bool:
    return metrics.get("entropy", math.inf) < 0.05 * first.get("entropy", 0.0)


def _drifted(metrics: Mapping[str, float], first: Mapping[str, float]) -> bool:
    now, then = (each.get("completions/mean_length", 1.0) for each in (metrics, first))
    return not 1 / 3 <= now / max(then, 1.0) <= 3


ALARMS = {
    "entropy collapse": (
        _collapsed,
        "the entropy is below a twentieth of what it was at first: nothing new is sampled any more, which is well if "
        "all answers are right"
        "\n  → if not: a lower --learning-rate, a larger --kl-coef or --clip-high, or --entropy-coef",
    ),
    "length drift": (
        _drifted,
        "completions are a third, or three times, as long as at first"
        "\n  → look at samples.jsonl: does the reward pay for length? `length` and `overlong` are rewards too",
    ),
    "all truncated": (
        lambda metrics, first: metrics.get("completions/clipped_ratio", 0.0) >= 0.95,
        "nearly every completion is cut off, so that no answer is complete\n  → a larger --max-new-tokens",
    ),
    "no signal": (
        lambda metrics, first: metrics.get("frac_reward_zero_std", 0.0) >= 0.95,
        "in nearly every group all scores are equal, so that nothing is learned"
        "\n  → easier or harder prompts, a larger --group-size, --filter-groups, or a reward with more shades",
    ),
    "KL run-away": (
        lambda metrics, first: (
            metrics.get("objective/kl", 0.0) > max(10.0, metrics.get("completions/mean_length", 0.0))
        ),
        "the policy is more than a nat per token away from its reference"
        "\n  → a larger --kl-coef, or --kl-target, or a lower --learning-rate",
    ),
}
"""Of each alarm: whether it rings, and what to do about it. ``no signal`` is for recipes that compare a group."""
