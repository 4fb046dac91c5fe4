"""Trainers, run for real, reach the closed form: π*, the true score differences, the empirical distribution.

Every response is one token of a vocabulary of eight, so that the whole response space can be looked at. Rewards are
multiples of log 2, so that Bradley–Terry gives odds of whole numbers and a finite data set holds the population.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trueup import preference, reward, sft
from trueup.models.load import load_model
from trueup.models.scratch import make_model
from trueup.objectives.optimum import kl_regularized_optimum
from trueup.records import Completion, CompletionGroup

RESPONSES = range(8)
EXPONENTS = [0, 3, 1, 2, 0, 1, 2, 3]
REWARDS = math.log(2) * torch.tensor(EXPONENTS, dtype=torch.float64)
PROMPTS = [np.array([5]), np.array([6, 7])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    loaded = load_model(
        make_model(folder / "raw", characters="abcde", hidden_size=32, num_layers=1, num_heads=2, seed=1)
    )
    # A fresh head spans hardly any logits, and adapters leave it as it is: widen it, so that they can express π*.
    loaded.model.get_output_embeddings().weight.data *= 10
    loaded.model.save_pretrained(folder / "enumerable")
    loaded.tokenizer.save_pretrained(folder / "enumerable")
    return str(folder / "enumerable")


def group(prompt: np.ndarray, *responses: int) -> CompletionGroup:
    return CompletionGroup(prompt=prompt, completions=tuple(Completion(tokens=np.array([r])) for r in responses))


def population() -> list[CompletionGroup]:
    """Every pair of responses, each order as often as Bradley–Terry has it: odds 2^(difference of the exponents)."""
    groups = []
    for prompt, (i, j) in itertools.product(PROMPTS, itertools.combinations(RESPONSES, 2)):
        gap = EXPONENTS[i] - EXPONENTS[j]
        groups += [group(prompt, i, j)] * 2 ** max(gap, 0) + [group(prompt, j, i)] * 2 ** max(-gap, 0)
    return groups


def distribution(folder: str | Path, prompt: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        logits = load_model(folder, dtype="float32").model(torch.tensor(prompt)[None]).logits[0, -1]
    return logits.double().log_softmax(-1)


def settings(output: Path, groups: list, steps: int, **changes) -> dict:
    full_batch = {"batch_size": len(groups), "num_epochs": steps, "tokens_per_batch": 100_000, "dtype": "float32"}
    return full_batch | {"output": str(output), "quiet": True, "num_samples": 0, "learning_rate": 1e-2} | changes


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_dpo_reaches_the_closed_form_optimum(model: str, tmp_path: Path, lora_rank: int):
    beta, groups = 0.5, population()
    result = preference(
        model=model, data=groups, **settings(tmp_path / "dpo", groups, 250, beta=beta, lora_rank=lora_rank)
    )
    for prompt in PROMPTS:
        target, _ = kl_regularized_optimum(distribution(model, prompt), REWARDS, beta)
        reached = distribution(result.model_folder, prompt)
        assert torch.allclose(reached, target, atol=0.02), (reached - target).abs().max()
        assert (distribution(model, prompt) - target).abs().max() > 1  # it had a way to go


def test_reward_model_recovers_score_differences(model: str, tmp_path: Path):
    from trueup.models.heads import load_reward_model
    from trueup.models.scorer import prepare_reward_scorer
    from trueup.models.tree import tree_batch

    groups = population()
    result = reward(model=model, data=groups, **settings(tmp_path / "reward", groups, 250))
    scorer = prepare_reward_scorer(load_reward_model(result.model_folder).model)
    with torch.no_grad():
        scores = scorer(tree_batch([group(prompt, *RESPONSES) for prompt in PROMPTS])).view(2, -1).double()
    centred = scores - scores.mean(1, keepdim=True)
    assert torch.allclose(centred, (REWARDS - REWARDS.mean()).expand(2, -1), atol=0.02)


def test_sft_reaches_the_empirical_distribution(model: str, tmp_path: Path):
    counts = [1, 2, 3, 4, 5, 6, 7, 8]
    groups = [group(PROMPTS[0], r) for r in RESPONSES for _ in range(counts[r])]
    result = sft(model=model, data=groups, **settings(tmp_path / "sft", groups, 200))
    expected = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    assert torch.allclose(distribution(result.model_folder, PROMPTS[0]).exp(), expected, atol=2e-3)
