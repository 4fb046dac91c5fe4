"""Tiny trained reward models, each with a vocabulary of its own, and rows to score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trueup.errors import RewardError
from trueup.models.adapters import merge_and_save
from trueup.models.heads import load_reward_model
from trueup.models.scratch import make_model
from trueup.rewards.samples import Samples
from trueup.rewards.sandbox.run import check_confinement

LETTERS = "0123456789+= abcdefghijklmnopqrstuvwxyzHA:?"


def save_reward_model(folder: Path, **settings) -> str:
    """A reward model whose scores lie some tenths apart, saved as a training run saves it; its trunk lies beside it."""
    settings = {"characters": LETTERS, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_length": 96} | settings
    loaded = load_reward_model(make_model(folder / "trunk", **settings), dtype="float32", seed=settings["seed"])
    with torch.no_grad():
        loaded.model.score.weight.mul_(3)
    merge_and_save(loaded.model, folder / "reward")
    loaded.tokenizer.save_pretrained(folder / "reward")
    return str(folder / "reward")


@pytest.fixture(scope="session")
def reward_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("reward-models")
    others = [{"characters": LETTERS[::-1], "seed": 2}, {"family": "gpt2", "seed": 3}]
    return [save_reward_model(folder / str(i), **each) for i, each in enumerate([{"seed": 1}, *others])]


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, str]]:
    return [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"it is {a + b + 1}"[: 1 + (5 * a + b) % 7]}
        for a in range(1, 5)
        for b in range(1, 6)
        if (5 * a + b) % 7 > 1
    ]


@pytest.fixture(scope="session")
def confinement() -> None:
    """Skips where there are no user namespaces. A limit that doesn't hold is no reason to skip."""
    try:
        check_confinement()
    except RewardError as error:
        if "namespaces" not in error.what:
            raise
        pytest.skip(str(error))


@pytest.fixture
def samples():
    """Makes samples of completions, each with a prompt of its own and as many tokens as characters."""

    def make(completions: list[Any], prompts: list[Any] | None = None, **columns: list[Any]) -> Samples:
        count = len(completions)
        return Samples(
            prompts=prompts or [f"question {index}" for index in range(count)],
            completions=completions,
            completion_ids=[np.arange(len(completion)) for completion in completions],
            truncated=[False] * count,
            columns=columns,
            where=[f"data.jsonl:{index + 1}" for index in range(count)],
        )

    return make
