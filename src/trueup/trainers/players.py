"""Who takes part in an online run: the policy's scorer, the engine that samples, the reference, the critic, rewards."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueup.errors import SettingsError
from trueup.models.adapters import has_adapter
from trueup.models.heads import load_reward_model
from trueup.models.load import LoadedModel, disable_dropout
from trueup.models.scorer import RewardScorer, Scorer, prepare_reward_scorer, prepare_scorer
from trueup.models.tree import TreeBatch
from trueup.rewards.rewards import Rewards
from trueup.rollout.engine import Engine
from trueup.rollout.torch_engine import TorchEngine
from trueup.trainers.algorithms import Algorithm
from trueup.trainers.fingerprint import rewards_fingerprint, weights_fingerprint
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.reference import frozen_logprobs
from trueup.trainers.trained_model import save_trained


@dataclass(frozen=True)
class Players:
    """Everybody in a run but the optimisers."""

    scorer: Scorer
    """The policy."""
    engine: Engine
    """Writes the completions that are learned from: from the policy, or from what the run started from."""
    evaluator: Engine
    """Writes those of evaluations, from the policy: the same engine, unless that one samples from the start."""
    rewards: Rewards
    reference: Scorer | None
    """A frozen copy; with LoRA the policy's own scorer, to be called with its adapter off; None: there is none."""
    critic: RewardScorer | None
    """Reads a value at each state of a completion: before each scored token, then behind each completion's last."""
    temperature: float
    fingerprints: Mapping[str, str]

    @property
    def device(self) -> torch.device:
        return next(self.scorer.parameters()).device

    def old_logprobs(self, batch: TreeBatch) -> Tensor:
        """The policy's log-probs as it is now, without gradient: [S]."""
        with torch.no_grad():
            return self.scorer(batch, temperature=self.temperature).logprobs

    def ref_logprobs(self, batch: TreeBatch) -> Tensor:
        """The reference's log-probs: [S]."""
        assert self.reference is not None
        return frozen_logprobs(self.reference, batch, temperature=self.temperature)

    def values(self, batch: TreeBatch) -> tuple[Tensor, Tensor]:
        """The critic's values: of the state before each scored token, [S], and behind each completion, [C]."""
        assert self.critic is not None
        return self.critic(batch).split([len(batch.scored), len(batch.last)])  # pyright: ignore[reportReturnType]

    def take_policy_to_engine(self) -> None:
        """Sample from the policy as it is now, where it is the policy that is sampled from."""
        self.evaluator.update_weights(self.scorer.model)

    def take_policy_to_reference(self) -> None:
        """The policy as it is now becomes the reference (iterative GRPO)."""
        if self.reference is not None:
            self.reference.load_state_dict(self.scorer.state_dict())

    def moving_reference(self, settings: PolicySettings) -> dict[str, Any] | None:
        """The reference's weights for a checkpoint, where it does not stay what the run started from."""
        return dict(self.reference.state_dict()) if self.reference is not None and settings.reference_every else None


def load_players(
    settings: PolicySettings, algorithm: Algorithm, policy: Any, tokenizer: Any, *, reward: Any
) -> Players:
    """Make everybody ready, from the policy as it is before its first update.

    ``reward``: a function, several, or ``Rewards``, in place of the settings'. Raises as ``Rewards.load``,
    ``load_reward_model`` and ``prepare_scorer`` do, and ``SettingsError`` for settings without effect.
    """
    rewards = load_rewards(settings, tokenizer, reward)
    if algorithm.steps and not any(each.scores_steps for each in rewards.rewards):
        raise SettingsError(
            f"recipe {settings.recipe} needs scores of steps, and {' and '.join(rewards.names)} gives none",
            where="--reward",
            way_out="a process reward model: trueup reward --process trains one",
        )
    scorer = prepare_scorer(policy)
    needs_reference = settings.kl_coef > 0 or algorithm.reference
    engine = evaluator = load_engine(settings, policy, tokenizer)
    if algorithm.samples_from == "start":
        engine = load_engine(settings, copy.deepcopy(policy).requires_grad_(False), tokenizer)
    fingerprints = {"starting weights": weights_fingerprint(scorer), "rewards": rewards_fingerprint(rewards)}
    critic = load_critic(settings, policy, tokenizer) if algorithm.critic else None
    if critic is not None:
        fingerprints["critic"] = weights_fingerprint(critic)
    return Players(
        scorer=scorer,
        engine=engine,
        evaluator=evaluator,
        rewards=rewards,
        reference=frozen_copy(scorer) if needs_reference else None,
        critic=critic,
        temperature=settings.temperature,
        fingerprints=fingerprints,
    )


def load_engine(settings: PolicySettings, model: Any, tokenizer: Any) -> Engine:
    """What samples from a model."""
    return TorchEngine(
        model,
        tokenizer,
        max_batch_tokens=settings.max_batch_tokens,
        dtype=settings.rollout_dtype,
        compiled=settings.rollout_compile,
    )


def frozen_copy(scorer: Scorer) -> Scorer:
    """What stays of the policy while it learns. With LoRA that is in the policy: below its adapter."""
    return scorer if has_adapter(scorer.model) else copy.deepcopy(scorer).requires_grad_(False).eval()


def load_critic(settings: PolicySettings, policy: Any, tokenizer: Any) -> RewardScorer:
    """A model that says what a state is worth: a trunk of its own with a linear head at every token.

    It starts from ``settings.critic`` (a reward model keeps its head), or from the policy's trunk with a new head. The
    policy's trunk is not shared: what the critic has to learn would pull at the policy.
    """
    load = partial(load_reward_model, dtype=settings.dtype, device=settings.device, seed=settings.seed)
    if settings.critic:
        model = load(settings.critic).model
    elif has_adapter(policy):
        raise SettingsError(
            "a critic can't start from a policy with LoRA", where="--critic", way_out="--critic MODEL names its start"
        )
    else:
        model = load(LoadedModel(policy, tokenizer, "the policy")).model
    disable_dropout(model)
    critic = prepare_reward_scorer(model)
    critic.where = "states"
    return critic


def load_rewards(settings: PolicySettings, tokenizer: Any, given: Any) -> Rewards:
    """The rewards that are given, or those that the settings name."""
    if isinstance(given, Rewards):
        return given
    functions = settings.reward if given is None else given if isinstance(given, list | tuple) else [given]
    return Rewards.load(
        functions,
        settings.reward_weights or None,
        timeout=settings.reward_timeout,
        tokenizer=tokenizer,
        text=settings,
        dtype=settings.dtype,
        device=settings.device,
        tokens_per_batch=settings.tokens_per_batch,
    )


def save_critic(players: Players, tokenizer: Any, folder: Path) -> None:
    """Beside the policy's model, in the same layout: the next run's ``--critic``."""
    if players.critic is not None:
        save_trained(players.critic.model, tokenizer, folder.parent / "critic")  # pyright: ignore[reportArgumentType]
