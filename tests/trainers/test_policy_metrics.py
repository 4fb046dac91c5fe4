"""What an online run reports, on rollouts made by hand; its alarms; its evaluations, counted anew."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trueup import rl
from trueup.records import Completion, CompletionGroup, StopReason
from trueup.rewards.samples import RewardScores
from trueup.runs.folder import read_metrics
from trueup.trainers.algorithms import Learned
from trueup.trainers.experience import Experience, new_experience
from trueup.trainers.policy_metrics import FORGOTTEN, Alarms, learning_metrics, not_clipped, rollout_metrics
from trueup.trainers.policy_settings import PolicySettings

SCORES = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
SCORED = RewardScores(
    total=np.array([1.0, 0.0, 0.5, 0.5]),
    each={"right": np.array([1.0, 0.0, np.nan, 0.5]), "silent": np.full(4, np.nan)},
)


@pytest.fixture
def x() -> Experience:
    """Two prompts with two completions of 3, 1, 2 and 4 tokens; the last was cut off."""

    def completion(length: int) -> Completion:
        return Completion(
            tokens=np.arange(length),
            stop_reason=StopReason.LENGTH if length == 4 else StopReason.END,
            sampler_logprobs=-np.arange(1, length + 1, dtype=np.float32),
        )

    groups = [
        CompletionGroup(prompt=np.array([1]), completions=tuple(completion(n) for n in lengths))
        for lengths in ((3, 1), (2, 4))
    ]
    return new_experience(groups, SCORES, mask_truncated=False, device=torch.device("cpu"))


def test_a_rollout_is_described(x: Experience):
    assert rollout_metrics(x, SCORED) == pytest.approx(
        {
            "reward": 0.5,
            "reward_std": np.std([1.0, 0.0, 0.5, 0.5], ddof=1),
            "frac_reward_zero_std": 0.5,
            "completions/mean_length": 2.5,
            "completions/min_length": 1,
            "completions/max_length": 4,
            "completions/mean_terminated_length": 2,
            "completions/min_terminated_length": 1,
            "completions/max_terminated_length": 3,
            "completions/clipped_ratio": 0.25,
            "entropy": (6 + 1 + 3 + 10) / 10,
            "rewards/right/mean": 0.5,
            "rewards/right/std": 0.5,
        }
    )


def test_whitened_scores_are_no_rewards(x: Experience):
    whitened = replace(x, scores=2 * x.scores - 1)
    assert rollout_metrics(whitened, SCORED) == rollout_metrics(x, SCORED)


def test_what_a_critic_explains(x: Experience):
    """Before it learned from the rollout: 1 − Var[return − value]/Var[return]."""
    costs = torch.where(x.mask, -0.1, 0.0)
    values = torch.where(x.mask, torch.arange(16.0).view(4, 4).cos(), 0.0)
    returns = torch.where(x.mask, torch.arange(16.0).view(4, 4).sin(), 0.0)
    x = replace(x, rewards=x.rewards + costs, values=values, returns=returns)
    found = rollout_metrics(x, SCORED)
    g, v = (each[x.mask].double().numpy() for each in (returns, values))
    assert found["explained_variance"] == pytest.approx(1 - np.var(g - v) / np.var(g), rel=1e-5)
    assert found["objective/scores"] == pytest.approx(0.5)
    assert found["objective/non_score_reward"] == pytest.approx(-0.1 * 10 / 4)
    assert found["objective/rlhf_reward"] == pytest.approx(0.5 - 0.25)
    assert found["val/num_eos_tokens"] == 3
    assert rollout_metrics(replace(x, values=returns), SCORED)["explained_variance"] == pytest.approx(1)
    constant = torch.where(x.mask, 2.0, 0.0)
    assert rollout_metrics(replace(x, returns=constant), SCORED)["explained_variance"] == 0


def learned(**changes: Any) -> Learned:
    """Two completions of two and one tokens: ratios 1.5, 0.5 and 1.1."""
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
    ratio = torch.tensor([[1.5, 0.5], [1.1, 1.0]])
    given: dict[str, Any] = {
        "logprobs": logprobs,
        "old_logprobs": logprobs - ratio.log(),
        "advantages": torch.tensor([[2.0, -1.0], [1.0, 0.0]]),
        "mask": mask,
        "group_size": 2,
    }
    return Learned(**(given | changes))


def means(x: Learned, sampler: torch.Tensor, **settings: Any) -> dict[str, float]:
    return {name: v.mean().item() for name, v in learning_metrics(x, sampler, PolicySettings(**settings)).items()}


def test_how_far_the_policy_is():
    x = learned(ref_logprobs=torch.tensor([[-1.3, -1.5], [-0.5, 0.0]]), entropy=torch.tensor([[0.3, 0.6], [0.9, 7.0]]))
    sampler = x.old_logprobs + torch.tensor([[0.2, -0.1], [0.0, 0.0]])
    k3 = [math.exp(-d) - 1 + d for d in (0.3, -0.5, 0.0)]
    expected = {
        "clip_ratio/low_mean": 1 / 3,
        "clip_ratio/high_mean": 1 / 3,
        "clip_ratio/region_mean": 2 / 3,
        "approx_kl": sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)) / 3,
        "sampling/sampling_logp_difference/mean": 0.1,
        "sampling/importance_sampling_ratio/mean": (math.exp(-0.2) + math.exp(0.1) + 1) / 3,
        "kl": sum(k3) / 3,
        "objective/kl": (0.3 - 0.5 + 0.0) / 2,
        "policy/entropy_avg": 0.6,
    }
    assert means(x, sampler) == pytest.approx(expected, rel=1e-5)


def test_only_what_has_no_gradient_is_clipped():
    """A ratio that moved against its advantage keeps its gradient."""
    x = learned(advantages=torch.tensor([[-2.0, 1.0], [1.0, 0.0]]))
    assert means(x, x.old_logprobs)["clip_ratio/region_mean"] == 0
    # The first completion's ratio is √(1.5 · 0.5); both its tokens have that one, and it counts once.
    x = learned(whole_ratio=True, advantages=torch.tensor([[-1.0, -1.0], [1.0, 0.0]]))
    found = means(x, x.old_logprobs, clip_low=0.1)
    assert found["clip_ratio/low_mean"] == pytest.approx(0.5)
    assert found["clip_ratio/high_mean"] == 0


def test_what_is_left_out_is_not_clipped(x: Experience):
    assert {name: len(v) for name, v in not_clipped(x, [0, 2], whole_ratio=False).items()} == {
        f"clip_ratio/{name}_mean": 5 for name in ("low", "high", "region")
    }
    assert len(not_clipped(x, [0, 2], whole_ratio=True)["clip_ratio/low_mean"]) == 2


# --- alarms

FINE = {"entropy": 1.0, "completions/mean_length": 30.0, "completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.1}
BAD: dict[str, dict[str, float]] = {
    "entropy collapse": {"entropy": 0.04},
    "length drift": {"completions/mean_length": 91.0},
    "all truncated": {"completions/clipped_ratio": 0.97},
    "no signal": {"frac_reward_zero_std": 1.0},
    "KL run-away": {"objective/kl": 31.0},
}


@pytest.mark.parametrize("name", BAD)
def test_an_alarm_rings_once_and_again_when_it_comes_anew(name: str):
    alarms = Alarms()
    bad = FINE | BAD[name]
    flag = {f"alarms/{name.replace(' ', '_')}": 1.0}
    assert alarms.heard(FINE) == []
    assert alarms.metrics == {}
    (text,) = alarms.heard(bad)
    assert text.startswith(f"alarm, {name}: ")
    assert "→" in text
    assert alarms.metrics == flag
    assert alarms.heard(bad) == []
    assert alarms.metrics == flag
    assert alarms.heard(FINE) == []
    assert alarms.metrics == {}
    assert alarms.heard(bad) == [], "it only wavers"
    for _ in range(FORGOTTEN):
        assert alarms.heard(FINE) == []
    # As a checkpoint has it.
    again = Alarms(**json.loads(json.dumps(vars(alarms))))
    assert len(again.heard(bad)) == 1


def test_completions_that_shrink_drift_too():
    alarms = Alarms()
    alarms.heard(FINE)
    assert len(alarms.heard(FINE | {"completions/mean_length": 9.0})) == 1


def test_a_run_says_its_alarms(tiny_model: str, output: str, capsys: pytest.CaptureFixture[str]):
    rl(
        recipe="rloo",
        model=tiny_model,
        data=[{"prompt": "1+1="}],
        reward=lambda completions: [0.0] * len(completions),
        output=output,
        batch_size=1,
        max_steps=2,
        max_new_tokens=2,
        kl_coef=0.0,
    )
    shown = capsys.readouterr().out
    assert shown.count("alarm, no signal") == 1
    lines = read_metrics(Path(output) / "metrics.jsonl")
    assert all(line["alarms/no_signal"] == 1 for line in lines)
    assert [line["grad_norm"] for line in lines] == [0, 0]


# --- evaluation


def test_an_evaluation_counts(tiny_model: str, output: str):
    """pass@1 is the share of right answers, pass@3 that of prompts with one, from the very samples that it shows."""
    held_out = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(5)]

    def has_even(completions: list[str], **_: Any) -> list[float]:
        return [float(any(c in "02468" for c in each)) for each in completions]

    rl(
        recipe="rloo",
        model=tiny_model,
        data=[{"prompt": "9+9="}],
        eval_data=held_out,
        reward=has_even,
        output=output,
        batch_size=1,
        max_steps=1,
        max_new_tokens=2,
        eval_completions=3,
        num_samples=len(held_out),
        quiet=True,
    )
    lines = read_metrics(Path(output) / "metrics.jsonl")
    before, after = (line for line in lines if "eval_reward" in line)
    assert (before["step"], after["step"]) == (0, 1)
    samples = [json.loads(line) for line in (Path(output) / "samples.jsonl").read_text().splitlines()]
    first = [sample for sample in samples if sample["step"] == 0]
    assert len(first) == 60
    right = Counter(sample["prompt"] for sample in first if sample["score"] == 1)
    assert all(sample["score"] == has_even([sample["completion"]])[0] for sample in first)
    assert before["eval_reward"] == before["eval_pass@1"] == pytest.approx(sum(right.values()) / 60)
    assert before["eval_pass@3"] == pytest.approx(len(right) / 20)
    assert before["eval_pass@1"] < before["eval_pass@3"]
    for name in ("reward", "pass@1", "pass@3", "completions/mean_length"):
        assert before[f"eval_{name}_low"] < before[f"eval_{name}"] < before[f"eval_{name}_high"]
    assert 0 < before["eval_completions/clipped_ratio"] <= 1
    assert before["eval_rewards/has_even/mean"] == before["eval_reward"]
