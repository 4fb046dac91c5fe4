"""Settings of the online loop. Free of torch, so that ``--help`` is instant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trueup.errors import SettingsError
from trueup.rewards.settings import RewardChoice
from trueup.rollout.settings import SamplingParams
from trueup.runs.settings import check_choices, check_range, check_used
from trueup.trainers.settings import TrainSettings

KLForm = Literal["reward", "token_k3", "token_k2", "weighted_k3", "prefix_k1", "prefix_k3", "sequence_k2"]


@dataclass(frozen=True, kw_only=True)
class PolicySettings(RewardChoice, TrainSettings):
    """Online reinforcement learning: sample, score, advantages, surrogate, step.

    A recipe chooses the estimator, the surrogate and the reduction, and sets defaults; everything here can be set
    otherwise. Its table is ``recipes.RECIPES``.
    """

    recipe: str = "grpo"
    """What is done: reinforce, rloo, ppo, grpo … `trueup rl --help` lists them."""
    output: str = "runs/rl"
    """Folder of this run: settings, metrics, samples and checkpoints."""

    success_score: float = 1.0
    """A completion with at least this score is right: for pass@k, and for the recipes that learn from right ones."""

    batch_size: int = 16
    """Prompts per rollout."""
    group_size: int = 8
    """Completions per prompt."""
    max_steps: int | None = None
    """Stop after this many optimiser steps; then --num-epochs does not count: prompts come again as often as needed."""
    num_mini_batches: int = 1
    """Optimiser steps in one pass over a rollout."""
    inner_epochs: int = 1
    """Passes over a rollout."""

    max_new_tokens: int = 256
    """Longest completion."""
    temperature: float = 1.0
    """Temperature of sampling, at which log-probs are taken too."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0: from all. In training this cuts off what can't be learned back."""
    top_p: float = 1.0
    """Sample from the most likely tokens with this much probability only. In training as --top-k."""
    min_p: float = 0.0
    """Sample only tokens with this fraction of the most likely one's probability. In training as --top-k."""
    stop_strings: tuple[str, ...] = ()
    """Text that ends a completion, beside the end token."""
    max_batch_tokens: int | None = None
    """Most tokens that the sampler keeps keys and values of; by default as many as 2 GiB hold (8 GiB on a GPU)."""
    rollout_dtype: Literal["same", "float32", "bfloat16"] = "same"
    """Precision of sampling. Another one than the model's takes a copy, refreshed after every rollout; see
    --importance."""
    rollout_compile: bool = False
    """Compile the sampler's attention: some 10 seconds at the start for faster sampling. Needs a C++ compiler."""

    gamma: float = 1.0
    """Discount of a token's reward per token before it. Below 1 it discounts a KL in the reward too."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation, for recipes with a critic."""
    whiten_advantages: bool = False
    """Shift and scale the advantages of a rollout to mean 0 and standard deviation 1."""
    whiten_scores: bool = False
    """Shift and scale the scores of a rollout to mean 0 and standard deviation 1, before anything else."""
    clip_low: float = 0.2
    """How far below 1 the ratio still has a gradient."""
    clip_high: float = 0.2
    """How far above 1 the ratio still has a gradient."""
    dual_clip: float | None = None
    """Bound on the ratio where the advantage is negative; 3 is usual, None is none."""
    penalty_coef: float = 1.0
    """Recipe ppo_penalty: coefficient of the KL to the policy that sampled."""
    penalty_target: float | None = None
    """Recipe ppo_penalty: KL to the policy that sampled, in nats per token, that an update should bring about: then
    --penalty-coef is doubled or halved to get there (adapt_kl_penalty)."""

    kl_coef: float = 0.0
    """Coefficient β of the KL to the reference, which is the model that the run starts from; 0: no reference."""
    kl_form: KLForm = "reward"
    """Where and how that KL enters: 'reward' (k1 of each token, in the reward) is exact, as are 'sequence_k2',
    'prefix_k1' and 'prefix_k3' as losses; 'token_k3' is GRPO's as published; see docs/loops/policy.md."""
    kl_target: float | None = None
    """KL to the reference, in nats per completion, that --kl-coef is moved to keep (adapt_kl_leash); None: it stays."""
    reference_every: int | None = None
    """Make the policy its own reference again every this many rollouts (iterative GRPO)."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus, in nats per token."""
    target_kl: float | None = None
    """Leave the rest of a rollout's steps out once the policy is this far from the one that sampled, in nats per
    token."""

    importance: Literal["none", "truncated", "masked"] = "none"
    """Weigh tokens by π_old/π_sampler, where trainer and sampler differ: cut at --importance-cap, or left out
    beyond."""
    importance_cap: float = 2.0
    """Largest such weight (and for 'masked' its inverse the smallest)."""
    truncated_completions: Literal["terminal", "masked", "bootstrapped"] = "terminal"
    """What --max-new-tokens has cut off: it ends there and its score counts; nothing is learned from it; or the critic
    says what it would still have earned."""
    filter_groups: bool = False
    """Sample further prompts in place of groups whose scores are all equal: they have no signal (DAPO)."""
    max_draws: int = 10
    """With --filter-groups: most times that prompts are drawn for one rollout; then it makes do with what it has."""

    critic: str = ""
    """Recipes with a critic: model that the critic starts from; by default the policy. A reward model is usual."""
    critic_learning_rate: float | None = None
    """Peak learning rate of the critic; by default the policy's."""
    critic_warmup: int = 0
    """Rollouts in which only the critic learns."""
    value_clip: float | None = None
    """How far a value may move from its old one with gradient, in units of the scores; None: any distance."""

    eval_completions: int = 4
    """Completions per held-out prompt at an evaluation."""
    num_samples: int = 4
    """Held-out prompts whose completions are written to samples.jsonl at every evaluation; 0 for none."""

    def __post_init__(self) -> None:
        TrainSettings.__post_init__(self)
        RewardChoice.__post_init__(self)
        check_choices(self)
        for name in ("group_size", "num_mini_batches", "inner_epochs", "max_draws", "max_batch_tokens"):
            check_range(self, name, at_least=1)
        for name in ("reference_every", "eval_completions"):
            check_range(self, name, at_least=1)
        for name in ("kl_target", "target_kl", "penalty_target", "value_clip", "temperature"):
            check_range(self, name, above=0, below=math.inf)
        for name in ("kl_coef", "entropy_coef", "penalty_coef"):
            check_range(self, name, at_least=0, below=math.inf)
        for name in ("gamma", "gae_lambda", "clip_low"):
            check_range(self, name, at_least=0, at_most=1)
        for name in ("clip_high", "critic_warmup"):
            check_range(self, name, at_least=0)
        check_range(self, "critic_learning_rate", above=0, below=math.inf)
        check_range(self, "importance_cap", at_least=1)
        check_range(self, "dual_clip", above=1 + self.clip_high)
        if self.num_mini_batches > self.batch_size:
            raise SettingsError(
                f"{self.num_mini_batches} parts can't be made of {self.batch_size} prompts",
                where="--num-mini-batches",
                way_out="raise --batch-size",
            )
        if self.reference_every and self.lora_rank:
            raise SettingsError(
                "needs the whole model trained: with LoRA the reference is the model below the adapter",
                where="--reference-every",
                way_out="--lora-rank 0",
            )
        if self.lora_dropout:
            raise SettingsError(
                "a policy that samples without dropout is another one with it: every ratio would be wrong",
                where="--lora-dropout",
                way_out="leave it out",
            )
        check_used(self, False, "an offline loop", "streaming", "sample_tokens", "train_turns")
        check_used(self, self.kl_coef > 0, "--kl-coef", "kl_target", "reference_every")
        several = self.steps_per_rollout > 1
        check_used(self, several, "several steps per rollout (--num-mini-batches, --inner-epochs)", "target_kl")
        check_used(self, self.importance != "none", "--importance", "importance_cap")
        check_used(self, self.filter_groups, "--filter-groups", "max_draws")
        self.sampling()

    @property
    def steps_per_rollout(self) -> int:
        return self.num_mini_batches * self.inner_epochs

    def sampling(self, **changes: object) -> SamplingParams:
        """How the rollouts are sampled. Raises ``SettingsError`` for a value out of range."""
        given = {
            "num_completions": self.group_size,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "stop_strings": self.stop_strings,
            "seed": self.seed,
        }
        return SamplingParams(**(given | changes))  # pyright: ignore[reportArgumentType]
