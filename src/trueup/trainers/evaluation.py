"""Held-out evaluation of an online run: the policy answers prompts that it does not learn from."""

from __future__ import annotations

import numpy as np

from trueup.rewards.samples import plain
from trueup.runs.progress import RunProgress
from trueup.runs.sampled import pass_at_k_metrics, with_interval
from trueup.trainers.players import Players
from trueup.trainers.policy_inputs import PolicyInputs
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.session import Session


def evaluate_policy(
    session: Session,
    settings: PolicySettings,
    players: Players,
    inputs: PolicyInputs,
    progress: RunProgress,
    step: int,
) -> dict[str, float]:
    """Sample, score, and write down what came: metrics with 95 % intervals that count prompts, and some completions.

    Random streams are those of the next seed: not the ones of any rollout, and the same at every evaluation, so that
    two evaluations differ by what the policy has learned.
    """
    if not inputs.held_out:
        return {}
    requests, size = inputs.held_out, settings.eval_completions
    sampling = settings.sampling(num_completions=size, seed=settings.seed + 1, stop_tokens=inputs.stop_tokens)
    most = len(requests) * size * settings.max_new_tokens
    players.take_policy_to_engine()
    with progress.meter(most, "evaluation, tokens", at_most=True) as told:
        groups = players.evaluator.generate([request.tokens for request in requests], sampling, progress=told)
        samples = inputs.samples(requests, groups)
        scores = players.rewards.score(samples)
    table = scores.total.reshape(-1, size)
    right = (table >= settings.success_score).sum(-1)
    lengths = np.array([len(tokens) for tokens in samples.completion_ids], dtype=float)
    prompts = np.repeat(np.arange(len(requests)), size)
    figures = {
        **with_interval("reward", scores.total, prompts),
        **with_interval("completions/mean_length", lengths, prompts),
        "completions/clipped_ratio": float(np.mean(samples.truncated)),
        **pass_at_k_metrics(np.full(len(requests), size), right, sorted({1, size})),
        **{f"rewards/{name}/mean": float(np.nanmean(each)) for name, each in scores.each.items() if len(each)},
    }
    metrics = {f"eval_{name}": value for name, value in figures.items()}
    session.log(metrics, step)
    shown = range(min(settings.num_samples, len(requests)) * size)
    session.folder.log_samples(
        [
            {"prompt": plain(samples.prompts[i]), "completion": plain(samples.completions[i]), "score": scores.total[i]}
            for i in shown
        ],
        step,
    )
    return metrics
