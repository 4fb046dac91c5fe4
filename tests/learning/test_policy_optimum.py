"""Online methods, run for real, end at the closed-form optimum π* ∝ π_ref·exp(r/β), and those that shouldn't, don't.

Answers are one token out of eight, as in ``test_optimum.py``, so that every distribution is read off the model; they
are sampled by the engine, scored by a reward function and learned from by the loop as ``trueup rl`` runs it. A KL in
the reward makes the advantage constant at π*, so that the noise of sampling ends there too; forms that are losses keep
some, which the falling learning rate averages out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trueup import rl
from trueup.models.load import LoadedModel, load_model
from trueup.models.scratch import make_model
from trueup.objectives.optimum import kl_regularized_optimum

BETA = 0.5
REWARDS = torch.tensor([0.0, 1.2, 0.3, 0.9, -0.4, 0.5, 0.8, 0.1], dtype=torch.float64)
PROMPTS = {"c": [5], "de": [6, 7]}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_model(
        tmp_path_factory.mktemp("models") / "raw", characters="abcde", hidden_size=32, num_layers=1, num_heads=2, seed=1
    )
    return load_model(folder, dtype="float32")


def distributions(model: Any) -> torch.Tensor:
    """log π of the eight answers to each prompt, [P, 8]."""
    with torch.no_grad():
        logits = [model(torch.tensor([tokens])).logits[0, -1] for tokens in PROMPTS.values()]
    return torch.stack(logits).double().log_softmax(-1)


def worth(completion_ids: list[list[int]]) -> list[float]:
    return [REWARDS[tokens[0]].item() for tokens in completion_ids]


def noisy_worth() -> Callable[..., list[float]]:
    """With Gumbel noise the better of two is i with probability σ(r_i − r_j): Bradley–Terry."""
    rng = np.random.default_rng(0)
    return lambda completion_ids: [value + float(rng.gumbel()) for value in worth(completion_ids)]


def divergence(logprobs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """KL of the first from the second, of each prompt."""
    return (logprobs.exp() * (logprobs - others)).sum(-1)


def train(start: LoadedModel, output: Path, **settings: Any) -> torch.Tensor:
    """log π of the policy that comes out."""
    model = copy.deepcopy(start.model)
    defaults = {
        "reward": worth,
        "batch_size": 4,
        "group_size": 32,
        "max_new_tokens": 1,
        "max_steps": 80,
        "learning_rate": 1e-2,
        "max_grad_norm": 1e9,
        "kl_coef": BETA,
        "num_mini_batches": 1,
        "inner_epochs": 1,
        "num_samples": 0,
        "quiet": True,
    }
    data = [{"prompt": prompt} for prompt in PROMPTS] * 2
    rl(model=model, tokenizer=start.tokenizer, data=data, output=str(output), **(defaults | settings))
    return distributions(model)


RUNS: dict[str, tuple[dict[str, Any], float, float]] = {
    "rloo": ({"recipe": "rloo"}, BETA, 1e-3),
    "reinforce": ({"recipe": "reinforce", "max_steps": 150}, BETA, 1e-2),
    "ppo": (
        {"recipe": "ppo", "max_steps": 320, "num_mini_batches": 2, "inner_epochs": 2, "whiten_advantages": False},
        BETA,
        1e-3,
    ),
    # The own score is part of the baseline: the reward's gradient shrinks by (k − 1)/k, and β seems larger.
    "grpo without std": ({"recipe": "dr_grpo", "kl_form": "sequence_k2"}, BETA * 32 / 31, 1e-2),
    # The std is that of rewards with the KL inside: where they are all equal, it divides nothing.
    "grpo, KL in the reward": ({"recipe": "grpo", "kl_form": "reward"}, BETA, 1e-3),
    "online_dpo": (
        {"recipe": "online_dpo", "group_size": 2, "batch_size": 128, "max_steps": 200, "learning_rate": 3e-3},
        BETA,
        2e-2,
    ),
}
"""Settings, the β of the optimum, and how much of KL(π‖π*) may be left, in nats."""


@pytest.mark.parametrize("name", RUNS)
def test_the_optimum_is_reached(name: str, start: LoadedModel, tmp_path: Path):
    settings, beta, allowed = RUNS[name]
    more = {"reward": noisy_worth()} if name == "online_dpo" else {}
    reached = train(start, tmp_path / "run", **settings, **more)
    reference = distributions(start.model)
    optimum, _ = kl_regularized_optimum(reference, REWARDS.expand_as(reference), beta)
    assert divergence(reached, optimum).max() < allowed
    assert divergence(reference, optimum).min() > 5 * allowed  # it had a way to go


LONGER = {"max_steps": 150, "group_size": 96}
"""Where the noise of sampling does not end, and the std of a small group is another than that of the policy."""


def test_grpo_with_std_and_an_exact_kl_has_another_beta(start: LoadedModel, tmp_path: Path):
    """Rewards are divided by their standard deviation, the KL is not: β is multiplied by it."""
    reached = train(start, tmp_path / "run", recipe="grpo", kl_form="sequence_k2", kl_coef=1.0, **LONGER)
    reference, rewards = distributions(start.model), REWARDS.expand(2, -1)
    mean = (reached.exp() * rewards).sum(-1, keepdim=True)
    std = (reached.exp() * (rewards - mean).square()).sum(-1, keepdim=True).sqrt()
    optimum, _ = kl_regularized_optimum(reference, rewards, 1.0)
    own, _ = kl_regularized_optimum(reference, rewards / std, 1.0)
    assert divergence(reached, own).max() < 2e-2
    assert divergence(reached, optimum).min() > 0.15


def test_published_grpo_ends_at_its_own_fixed_point(start: LoadedModel, tmp_path: Path):
    """k3 as a loss is the KL in the other direction: π(y)·(1 − (r(y) − r̄)/(σ β)) = π_ref(y), which no β turns into
    π*."""
    reached, beta = train(start, tmp_path / "run", recipe="grpo", kl_coef=4.0, **LONGER).exp(), 4.0
    reference, rewards = distributions(start.model).exp(), REWARDS.expand(2, -1)

    def distance(policy: torch.Tensor) -> float:
        mean = (policy * rewards).sum(-1, keepdim=True)
        std = (policy * (rewards - mean).square()).sum(-1, keepdim=True).sqrt()
        return (policy * (1 - (rewards - mean) / std / beta) - reference).abs().max().item()

    tilted, _ = kl_regularized_optimum(reference.log(), rewards, beta)
    assert distance(reached) < 0.01
    assert min(distance(tilted.exp()), distance(reference)) > 0.03
