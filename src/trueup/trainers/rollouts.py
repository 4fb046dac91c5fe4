"""One rollout: prompts answered by the policy, scored, and laid out for learning with everything that it needs."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trueup.data.collate import epoch_order
from trueup.objectives.advantages import running_mean, whiten
from trueup.objectives.divergence import kl_penalized_rewards
from trueup.records import CompletionGroup
from trueup.rewards.samples import RewardScores
from trueup.runs.progress import RunProgress
from trueup.trainers.algorithms import Algorithm
from trueup.trainers.experience import Experience, new_experience, passes, put_rows, put_steps, said_by, units
from trueup.trainers.players import Players
from trueup.trainers.policy_inputs import PolicyInputs
from trueup.trainers.policy_metrics import rollout_metrics
from trueup.trainers.policy_settings import PolicySettings


@dataclass
class Moving:
    """What moves from rollout to rollout, beside weights: plain numbers, part of every checkpoint."""

    kl_coef: float
    """β, of the KL to the reference."""
    penalty_coef: float
    """Of the KL to the policy that sampled."""
    num_drawn: int = 0
    """Prompts drawn so far."""
    baseline: float = 0.0
    """Mean of what all completions so far earned."""
    num_earned: int = 0
    stopped: bool = False
    """Whether the rest of this rollout is left out: the policy has gone far enough."""


def roll_out(
    number: int,
    settings: PolicySettings,
    algorithm: Algorithm,
    players: Players,
    inputs: PolicyInputs,
    moving: Moving,
    progress: RunProgress,
) -> tuple[Experience, dict[str, float]]:
    """The rollout of this number, and its metrics. ``moving`` moves once all is there: where it can't be, nothing has
    happened."""
    began = time.perf_counter()
    groups, scored, num_drawn, seconds_scoring = sample_and_score(settings, players, inputs, moving, progress)
    x = new_experience(
        groups,
        scores_of(scored, settings),
        mask_truncated=settings.truncated_completions == "masked",
        device=players.device,
    )
    sampled = time.perf_counter()
    kl_in_reward = settings.kl_form == "reward" and players.reference is not None and not algorithm.reference
    if kl_in_reward or settings.num_mini_batches > 1:
        # The first mini-batch needs no pass of its own: the policy has not moved when its turn comes.
        first = () if kl_in_reward else mini_batch(len(groups), settings, number * settings.steps_per_rollout)
        later = [index for index in range(len(groups)) if index not in set(first)]
        x = replace(x, old_logprobs=said_by(players.old_logprobs, x, later, settings.tokens_per_batch, x.old_logprobs))
    if players.reference is not None:
        x = replace(x, ref_logprobs=said_by(players.ref_logprobs, x, range(len(groups)), settings.tokens_per_batch))
    if kl_in_reward:
        assert x.ref_logprobs is not None
        rewards = kl_penalized_rewards(x.rewards, x.old_logprobs, x.ref_logprobs, kl_coef=moving.kl_coef, mask=x.mask)
        x = replace(x, rewards=rewards)
    if players.critic is not None:
        x = critic_values(x, players, settings)
    if scored.steps is not None and scored.step_ends is not None:
        x = put_steps(x, scored.steps, scored.step_ends)
    x = replace(x, baseline=moving.baseline)
    advantages = algorithm.advantages(x, settings)
    x = replace(x, returns=None if x.values is None else advantages + x.values)
    if settings.whiten_advantages:
        advantages = whiten(advantages, x.learned)
    x = replace(x, advantages=advantages)

    baseline, moving.num_earned = running_mean(torch.tensor(moving.baseline), moving.num_earned, x.totals)
    moving.num_drawn, moving.baseline, moving.stopped = num_drawn, baseline.item(), False
    metrics = rollout_metrics(x, scored) | {
        "num_prompts": moving.num_drawn,
        "sample_seconds": sampled - began - seconds_scoring,
        "score_seconds": seconds_scoring,
        "prepare_seconds": time.perf_counter() - sampled,
    }
    return x, metrics


def sample_and_score(
    settings: PolicySettings, players: Players, inputs: PolicyInputs, moving: Moving, progress: RunProgress
) -> tuple[list[CompletionGroup], RewardScores, int, float]:
    """The groups of one rollout, their scores, how many prompts have been drawn by now, and the seconds that scoring
    took.

    With ``filter_groups`` groups whose scores are all equal are replaced by those of further prompts (dynamic sampling:
    Yu et al. 2025, arXiv 2503.14476, §3.2). Where no group at all has a signal, the last ones that were drawn stay.
    """
    kept: list[tuple[CompletionGroup, RewardScores]] = []
    drawn: list[tuple[CompletionGroup, RewardScores]] = []
    num_drawn, seconds = moving.num_drawn, 0.0
    sampling = replace(settings.sampling(), stop_tokens=inputs.stop_tokens)
    for _ in range(settings.max_draws if settings.filter_groups else 1):
        requests = inputs.draw(num_drawn, settings.batch_size)
        num_drawn += len(requests)
        most = len(requests) * settings.group_size * settings.max_new_tokens
        with progress.meter(most, "sampling, tokens", at_most=True, part_of_step=True) as told:
            prompts = [request.tokens for request in requests]
            numbers = [request.number for request in requests]
            groups = players.engine.generate(prompts, sampling, requests=numbers, progress=told)
        began = time.perf_counter()
        scores = players.rewards.score(inputs.samples(requests, groups))
        seconds += time.perf_counter() - began
        drawn = list(zip(groups, scores.of_groups(settings.group_size), strict=True))
        kept += [each for each in drawn if not settings.filter_groups or np.ptp(each[1].total) > 0]
        if len(kept) >= settings.batch_size:
            break
    chosen = kept[: settings.batch_size] or drawn
    return [group for group, _ in chosen], RewardScores.joined([scores for _, scores in chosen]), num_drawn, seconds


def scores_of(scored: RewardScores, settings: PolicySettings) -> Tensor:
    """[N, K], whitened over the rollout where the settings say so."""
    scores = torch.from_numpy(scored.total).float().view(-1, settings.group_size)
    return whiten(scores) if settings.whiten_scores else scores


def critic_values(x: Experience, players: Players, settings: PolicySettings) -> Experience:
    """The rollout with the critic's values, and what it expects behind each completion."""
    values, bootstrap = torch.zeros_like(x.rewards), x.rewards.new_zeros(len(x.rewards))
    everything = units(x, range(len(x.groups)), np.ones(len(x.rewards), dtype=bool), settings.tokens_per_batch)
    with torch.no_grad():
        for micro in passes(everything, settings.tokens_per_batch, players.device):
            before, behind = players.values(micro.batch)
            put_rows(values, micro, before)
            bootstrap[micro.rows] = behind
    return replace(x, values=values, bootstrap=bootstrap)


def mini_batch(num_groups: int, settings: PolicySettings, step: int) -> list[int]:
    """The groups of this optimiser step: each pass over a rollout goes through them in an order of its own."""
    one_pass, place = divmod(step, settings.num_mini_batches)
    order = epoch_order(num_groups, settings.seed, one_pass)
    return np.array_split(order, settings.num_mini_batches)[place].tolist()
