"""What an online run measures, keeps and recognises, whatever happens to it."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest

import trueup
from trueup.rewards.built_in import Length
from trueup.rewards.rewards import Rewards
from trueup.runs.folder import read_metrics
from trueup.trainers.fingerprint import rewards_fingerprint
from trueup.trainers.policy import adapt
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.rollouts import Moving

SHORT: dict[str, Any] = {
    "max_new_tokens": 4,
    "batch_size": 6,
    "dtype": "float32",
    "quiet": True,
    "num_samples": 0,
    "holdout": 0.3,
}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(4) for b in range(6)))
    return str(path)


def brevity(completions, **columns):
    return [-len(completion) for completion in completions]


def test_evaluations_are_of_the_policy_where_the_samples_are_not(tiny_model: str, prompts: str, output: str):
    """rft learns from what the starting model writes; how well that does stays as it was, the policy gets better."""
    trueup.rl(
        recipe="rft",
        model=tiny_model,
        data=prompts,
        reward=brevity,
        output=output,
        max_steps=12,
        learning_rate=0.03,
        success_score=-1,
        **SHORT,
    )
    records = read_metrics(Path(output) / "metrics.jsonl")
    sampled = [record["reward"] for record in records if "reward" in record]
    before, after = (record["eval_reward"] for record in records if "eval_reward" in record)
    assert abs(sum(sampled[-6:]) / 6 - before) < 0.5
    assert after > before + 1.5


@pytest.mark.parametrize(("asked", "told"), [(["1+1=", "9+9=", "3+5=", "1+1="], "3 of the held-out"), (["9+9="], None)])
def test_held_out_prompts_that_are_learned_from_are_told(
    asked: list[str], told: str | None, tiny_model: str, prompts: str, output: str, capsys: pytest.CaptureFixture[str]
):
    held_out = [{"prompt": prompt} for prompt in asked]
    given = {**SHORT, "quiet": False, "holdout": 0.0, "eval_data": held_out, "max_steps": 1}
    trueup.rl(recipe="rloo", model=tiny_model, data=prompts, reward=brevity, output=output, **given)
    printed = capsys.readouterr().out
    assert (f"{told} prompts are training prompts too" in printed) if told else ("training prompts too" not in printed)


def test_the_critic_of_a_run_starts_the_next(tiny_model: str, prompts: str, output: str):
    given = {"recipe": "ppo", "model": tiny_model, "data": prompts, "reward": brevity, "max_steps": 2, **SHORT}
    first = trueup.rl(output=output, inner_epochs=1, num_mini_batches=1, **given)
    critic = str(first.model_folder.parent / "critic")
    second = trueup.rl(output=f"{output}-2", inner_epochs=1, num_mini_batches=1, critic=critic, **given)
    losses = [
        next(r["loss/value_avg"] for r in read_metrics(each.folder / "metrics.jsonl") if "loss/value_avg" in r)
        for each in (first, second)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_step_that_was_skipped_moves_no_coefficient(broken: float):
    moving = Moving(kl_coef=0.05, penalty_coef=1.0)
    settings = PolicySettings(kl_coef=0.05, kl_target=1.0, penalty_target=0.01)
    adapt(settings, moving, {"objective/kl": broken, "approx_kl": broken})
    assert (moving.kl_coef, moving.penalty_coef) == (0.05, 1.0)
    adapt(settings, moving, {"objective/kl": 9.0, "approx_kl": 1.0})
    assert moving.kl_coef > 0.05
    assert moving.penalty_coef == 2.0


def fingerprint(*functions: Any, weights: Any = None) -> str:
    return rewards_fingerprint(Rewards.load(functions, weights))


def test_rewards_are_known_by_their_code(tmp_path: Path):
    path = tmp_path / "score.py"
    path.write_text("SCALE = 1\ndef f(completions, **columns):\n    return [SCALE] * len(completions)\n")
    spec = f"{path}:f"
    before = fingerprint(spec)
    assert fingerprint(spec) == before
    path.write_text(path.read_text().replace("SCALE = 1", "SCALE = 2"))
    assert fingerprint(spec) != before  # what it reads counts too


def test_rewards_are_known_by_their_parameters_and_weights():
    assert fingerprint("length:target=3") == fingerprint("length:target=3")
    assert fingerprint("length:target=3") != fingerprint("length:target=4")
    assert fingerprint("length:target=3", weights=[1]) != fingerprint("length:target=3", weights=[2])
    assert fingerprint("exact", "math") != fingerprint("math", "exact")


def test_rewards_without_code_are_known_by_their_name():
    """Of what has no source file (made by ``exec``) and of a part of a function, no error comes."""
    space: dict[str, Any] = {}
    exec("def made(completions, **columns): return []", space)
    assert fingerprint(space["made"]) == fingerprint(space["made"])
    part = functools.partial(brevity, unused=1)
    assert fingerprint(part) == fingerprint(part)
    assert fingerprint(Length(target=3)) == fingerprint(Length(target=3)) != fingerprint(Length(target=4))
