"""On TRL's model and tokens our loops make TRL's steps: ``trl_runs.json`` holds what TRL 1.16's own trainers logged.

The loss of the first step shows the objective, that of later ones gradient, clipping and optimiser; all in float32, in
the order of the data, and TRL's micro-batches are two rows each where ours are cut by tokens.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForSequenceClassification

from trueup import preference, reward, sft
from trueup.models.load import load_tokenizer
from trueup.records import Completion, CompletionGroup
from trueup.runs.folder import read_metrics

HERE = Path(__file__).parent
RUNS = {name: steps for name, steps in json.loads((HERE / "trl_runs.json").read_text()).items() if name != "trl"}

specification = importlib.util.spec_from_file_location("trl_runs", HERE / "trl_runs.py")
assert specification is not None
assert specification.loader is not None
trl_runs = importlib.util.module_from_spec(specification)
specification.loader.exec_module(trl_runs)


def group(prompt: Sequence[int], *completions: Sequence[int], **about: Any) -> CompletionGroup:
    return CompletionGroup(
        prompt=np.array(prompt), completions=tuple(Completion(tokens=np.array(each)) for each in completions), **about
    )


DEMONSTRATIONS = [group(*each) for each in trl_runs.demonstrations()]
PAIRS = [group(*tokens, margin=margin) for *tokens, margin in trl_runs.comparisons()]

OURS: dict[str, tuple[Any, Any, list[CompletionGroup], dict[str, Any]]] = {
    "sft": (sft, {}, DEMONSTRATIONS, {}),
    "sft, all tokens": (sft, {}, DEMONSTRATIONS, {"train_on": "all"}),
    "sft, label smoothing": (sft, {}, DEMONSTRATIONS, {"label_smoothing": trl_runs.LABEL_SMOOTHING}),
    "reward": (reward, {"kind": LlamaForSequenceClassification}, PAIRS, {"use_margin": False}),
    "reward, margin": (reward, {"kind": LlamaForSequenceClassification}, PAIRS, {}),
    "reward, margin, centred": (
        reward,
        {"kind": LlamaForSequenceClassification},
        PAIRS,
        {"centering_coef": trl_runs.CENTERING},
    ),
    "dpo": (preference, {}, PAIRS, {"beta": 0.1}),
}


def test_every_run_is_held() -> None:
    assert list(OURS) == list(RUNS)


@pytest.mark.parametrize("tokens_per_batch", [40, 4096])
@pytest.mark.parametrize("name", OURS)
def test_our_steps_are_those_of_trl(name: str, tokens_per_batch: int, tiny_model: str, output: str) -> None:
    loop, kind, groups, settings = OURS[name]
    loop(
        model=trl_runs.tiny_llama(**kind),
        tokenizer=load_tokenizer(tiny_model),
        data=groups,
        output=output,
        streaming=True,
        max_steps=trl_runs.NUM_STEPS,
        batch_size=trl_runs.BATCH_SIZE,
        tokens_per_batch=tokens_per_batch,
        learning_rate=trl_runs.LEARNING_RATE,
        lr_schedule="constant",
        num_samples=0,
        quiet=True,
        **settings,
    )
    ours = [[line["loss"], line["grad_norm"]] for line in read_metrics(Path(output) / "metrics.jsonl")]
    assert ours[0] == pytest.approx(RUNS[name][0], rel=1e-5)
    for step, expected in zip(ours, RUNS[name], strict=True):
        assert step == pytest.approx(expected, rel=1e-4)
