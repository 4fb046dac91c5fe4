"""On TRL's model, completions and rewards our GRPO makes TRL's steps: ``trl_grpo.json`` holds what TRL 1.16's own
trainer logged (``trl_grpo.py``), every metric that we log under the same name."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trueup import rl
from trueup.models.load import load_tokenizer
from trueup.records import Completion, CompletionGroup, StopReason
from trueup.runs.folder import read_metrics
from trueup.trainers import players

HERE = Path(__file__).parent
RUNS = {name: steps for name, steps in json.loads((HERE / "trl_grpo.json").read_text()).items() if name != "trl"}


def module(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    made = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, made)
        if name != "trl_runs":
            patch.setitem(sys.modules, "trl_runs", trl_runs)
        specification.loader.exec_module(made)
    return made


trl_runs = module("trl_runs")
trl_grpo = module("trl_grpo")

OURS: dict[str, dict[str, Any]] = {
    "grpo": {"recipe": "grpo", "kl_coef": 0.1},
    "grpo, dual clip": {"recipe": "grpo", "kl_coef": 0.0, "dual_clip": 1.5},
    "grpo, truncated completions masked": {"recipe": "grpo", "kl_coef": 0.0, "truncated_completions": "masked"},
    "grpo, weighted k3": {"recipe": "grpo", "kl_coef": 0.1, "kl_form": "weighted_k3"},
    "grpo, entropy bonus": {"recipe": "dapo", "clip_high": 0.2, "entropy_coef": 0.05},
    "dr_grpo": {"recipe": "dr_grpo"},
    "dapo": {"recipe": "dapo"},
    "bnpo": {"recipe": "dapo", "clip_high": 0.2, "kl_coef": 0.1},
    "gspo": {"recipe": "gspo", "clip_low": 0.03, "clip_high": 0.04},
    "cispo": {"recipe": "cispo", "clip_high": 0.2},
}


class Written:
    """An engine that says what TRL was given, rollout by rollout."""

    def __init__(self) -> None:
        self.number = 0
        self.scores: list[float] = []

    def generate(self, prompts: Any, sampling: Any, *, requests: Any, progress: Any) -> list[CompletionGroup]:
        first = self.number * trl_grpo.NUM_PROMPTS
        self.number += 1
        rows = range(first, first + trl_grpo.NUM_PROMPTS)
        self.scores = [score for row in rows for score in trl_grpo.rewards(row)]
        return [
            CompletionGroup(
                prompt=np.array(trl_grpo.prompts()[row]),
                completions=tuple(
                    Completion(
                        tokens=np.array(said),
                        stop_reason=StopReason.END if said[-1] == trl_runs.END else StopReason.LENGTH,
                    )
                    for said in trl_grpo.completions(row)
                ),
            )
            for row in rows
        ]

    def update_weights(self, model: Any) -> None:
        pass


def test_every_run_is_held() -> None:
    assert list(OURS) == list(RUNS)


@pytest.mark.parametrize("tokens_per_batch", [12, 4096])
@pytest.mark.parametrize("name", OURS)
def test_our_steps_are_those_of_trl(
    name: str, tokens_per_batch: int, tiny_model: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Written()
    monkeypatch.setattr(players, "TorchEngine", lambda *_, **__: engine)
    rl(
        model=trl_runs.tiny_llama(),
        tokenizer=load_tokenizer(tiny_model),
        data=[{"prompt": "1+1="}] * trl_grpo.NUM_PROMPTS,
        reward=lambda completion_ids: engine.scores,
        output=output,
        max_steps=2 * trl_grpo.NUM_ROLLOUTS,
        batch_size=trl_grpo.NUM_PROMPTS,
        group_size=trl_grpo.GROUP_SIZE,
        inner_epochs=2,
        max_new_tokens=trl_grpo.LONGEST,
        tokens_per_batch=tokens_per_batch,
        learning_rate=trl_grpo.LEARNING_RATE,
        lr_schedule="constant",
        filter_groups=False,
        quiet=True,
        **OURS[name],
    )
    lines = read_metrics(Path(output) / "metrics.jsonl")
    assert len(lines) == len(RUNS[name])
    for step, (ours, trls) in enumerate(zip(lines, RUNS[name], strict=True)):
        if "weighted k3" in name:  # TRL logs the weighted one
            trls = {metric: value for metric, value in trls.items() if metric != "kl"}
        found = {metric: ours.get(metric) for metric in trls}
        assert found == pytest.approx(trls, rel=1e-4 if step < 2 else 1e-3, abs=1e-5), step


def test_the_runs_show_something() -> None:
    """Ratios are clipped on both sides, a group has no signal, and a completion was cut off."""
    for name, steps in RUNS.items():
        if name != "cispo":  # TRL logs that one's under another name
            assert min(steps[1]["clip_ratio/low_mean"], steps[1]["clip_ratio/high_mean"]) > 0.02, name
        assert steps[2]["frac_reward_zero_std"] == pytest.approx(1 / 3)
        assert steps[2]["completions/clipped_ratio"] > 0
