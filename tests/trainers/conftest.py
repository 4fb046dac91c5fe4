"""A model small enough that a whole training run takes a second, and data for it; and the parts of an online run, with
an engine whose answers are written down."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trueup.data.prompts import PromptRow
from trueup.data.settings import TokenizeSettings
from trueup.models.heads import load_reward_model
from trueup.models.load import LoadedModel, load_model
from trueup.models.scorer import RewardScorer, Scorer, prepare_reward_scorer, prepare_scorer
from trueup.models.scratch import make_model
from trueup.recipes import RECIPES, policy_defaults
from trueup.records import Completion, CompletionGroup, StopReason
from trueup.rewards.rewards import Rewards
from trueup.runs.progress import RunProgress
from trueup.trainers.algorithms import Algorithm
from trueup.trainers.experience import Experience
from trueup.trainers.players import Players
from trueup.trainers.policy import learn
from trueup.trainers.policy_inputs import PolicyInputs, Request
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.rollouts import Moving, roll_out
from trueup.trainers.tally import Tally


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
    # Small weights: where policy and reference are one, rounding says which answer is preferred, here the same always.
    return str(make_model(folder, characters="0123456789+=", initializer_range=0.02, seed=3, **sizes))


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, str]]:
    return [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(4) for b in range(6)
    ]


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "run")


# --- an online run, its parts in hand

END = 2


class Scripted:
    """An engine that gives the groups that it was given, rollout by rollout, the last ones again and again."""

    def __init__(self, rollouts: Sequence[Sequence[CompletionGroup]]) -> None:
        self.rollouts = list(rollouts)
        self.asked: list[list[int]] = []

    def generate(self, prompts: Any, sampling: Any, *, requests: Any = None, progress: Any = None) -> Any:
        self.asked.append(list(requests or range(len(prompts))))
        return list(self.rollouts.pop(0) if len(self.rollouts) > 1 else self.rollouts[0])

    def update_weights(self, model: Any) -> None:
        pass


@dataclass
class Stage:
    """Everything that ``roll_out`` and ``learn`` take."""

    settings: PolicySettings
    algorithm: Algorithm
    players: Players
    inputs: PolicyInputs
    moving: Moving
    asked: list[list[int]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def rollout(self, number: int = 0) -> Experience:
        with RunProgress(1, quiet=True) as progress:
            x, self.metrics = roll_out(
                number, self.settings, self.algorithm, self.players, self.inputs, self.moving, progress
            )
        return x

    def learn(self, x: Experience, chosen: Sequence[int], **options: Any) -> tuple[Tensor, Tally]:
        """The gradient of the policy in one float64 vector, and the tally."""
        parameters = [*self.players.scorer.parameters()]
        for parameter in parameters:
            parameter.grad = None
        tally = learn(x, chosen, self.settings, self.algorithm, self.players, self.moving, **options)
        return flat_gradient(parameters), tally

    def move(self, scale: float = 0.1) -> None:
        """The policy, somewhat off: as after optimiser steps."""
        disturb(self.players.scorer, scale, seed=7)


def flat_gradient(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for p in parameters])


def disturb(module: torch.nn.Module, scale: float, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


@dataclass(frozen=True)
class Cast:
    """The models of a stage: a policy of four tokens, and others that are no copies of it."""

    scorer: Scorer
    reference: Scorer
    critic: RewardScorer
    tokenizer: Any


@pytest.fixture(scope="session")
def cast(tmp_path_factory: pytest.TempPathFactory) -> Cast:
    """GPT-2, whose every operation has a float64 form; the vocabulary is <pad>, <unk>, <end> and 'a'."""
    folder = make_model(
        tmp_path_factory.mktemp("models") / "four",
        characters="a",
        family="gpt2",
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        seed=1,
    )
    loaded = load_model(folder, dtype="float32")
    critic = load_reward_model(LoadedModel(copy.deepcopy(loaded.model), loaded.tokenizer, "critic"), seed=0).model
    scorer, judge = prepare_scorer(loaded.model), prepare_reward_scorer(critic.float())
    judge.where = "states"
    for module in (scorer, judge):
        module.eval()
    disturb(scorer, 0.5, seed=1)
    disturb(judge, 0.5, seed=2)
    reference = copy.deepcopy(scorer).requires_grad_(False)
    disturb(reference, 0.15, seed=3)
    return Cast(scorer, reference, judge, loaded.tokenizer)


def completion(tokens: Sequence[int], longest: int, **about: Any) -> Completion:
    """A completion of these tokens; without the end token it has been cut off."""
    whole = tokens[-1] == END
    assert whole or len(tokens) == longest
    return Completion(
        tokens=np.array(tokens),
        stop_reason=StopReason.END if whole else StopReason.LENGTH,
        sampler_logprobs=np.zeros(len(tokens), dtype=np.float32),
        **about,
    )


def group(prompt: Sequence[int], completions: Sequence[Sequence[int]], longest: int) -> CompletionGroup:
    return CompletionGroup(
        prompt=np.array(prompt), completions=tuple(completion(tokens, longest) for tokens in completions)
    )


def worth(tokens: Sequence[int]) -> float:
    """A reward without any symmetry: no two short completions are worth the same."""
    return sum((place + 1.3) * [0.31, -0.7, 0.23, 1.1][token] for place, token in enumerate(tokens)) % 1.7


@pytest.fixture(scope="session")
def stage(cast: Cast) -> Callable[..., Stage]:
    """Makes a stage for a recipe (by name, or an ``Algorithm``) from the groups that are sampled."""

    def make(
        recipe: str | Algorithm,
        groups: Sequence[CompletionGroup] | Sequence[Sequence[CompletionGroup]],
        *,
        reward: Callable[[Sequence[int]], float] = worth,
        rewards: Any = None,
        own_reference: bool = False,
        **settings: Any,
    ) -> Stage:
        rollouts: Any = groups if isinstance(groups[0], list | tuple) else [groups]
        name = recipe if isinstance(recipe, str) else "reinforce"
        algorithm = RECIPES[recipe].algorithm() if isinstance(recipe, str) else recipe
        longest = max(len(c.tokens) for each in rollouts for g in each for c in g.completions)
        filled = {
            "batch_size": len(rollouts[0]),
            "group_size": len(rollouts[0][0].completions),
            "max_new_tokens": longest,
            "num_mini_batches": 1,
            "inner_epochs": 1,
            "num_samples": 0,
        }
        chosen = PolicySettings(**(policy_defaults(name) | filled | settings))

        def score(completion_ids: list, **_: Any) -> list[float]:
            return [reward(tokens) for tokens in map(list, completion_ids)]

        scorer = copy.deepcopy(cast.scorer)
        engine = Scripted(rollouts)
        with_reference = chosen.kl_coef > 0 or algorithm.reference
        reference = copy.deepcopy(scorer if own_reference else cast.reference) if with_reference else None
        players = Players(
            scorer=scorer,
            engine=engine,
            evaluator=engine,
            rewards=rewards or Rewards.load([score]),
            reference=reference,
            critic=copy.deepcopy(cast.critic) if algorithm.critic else None,
            temperature=chosen.temperature,
            fingerprints={},
        )
        request = Request(0, PromptRow(prompt="a", columns={}), np.array(rollouts[0][0].prompt))
        inputs = PolicyInputs(
            requests=(request,),
            held_out=(),
            num_steps=1,
            tokenizer=cast.tokenizer,
            how=TokenizeSettings.of(chosen, max_length=8),
            seed=0,
            fingerprints={},
        )
        moving = Moving(kl_coef=chosen.kl_coef, penalty_coef=chosen.penalty_coef, baseline=0.37, num_earned=5)
        return Stage(chosen, algorithm, players, inputs, moving, engine.asked)

    return make


@pytest.fixture(scope="session")
def new_group() -> Callable[..., CompletionGroup]:
    return group


@pytest.fixture(scope="session")
def reward_of() -> Callable[[Sequence[int]], float]:
    return worth
