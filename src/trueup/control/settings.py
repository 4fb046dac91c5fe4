"""Settings of agents for Gymnasium environments; free of torch, so that ``--help`` is instant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trueup.errors import SettingsError
from trueup.runs.record_settings import RecordSettings
from trueup.runs.settings import check_choices, check_range, check_used

Algorithm = Literal["reinforce", "a2c", "ppo", "dqn"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned, how, for how long, and where the run lies."""

    env: str = ""
    """Gymnasium environment, such as CartPole-v1; module:Name-v0 imports the module first."""
    algorithm: Algorithm = "ppo"
    """How: reinforce, a2c, ppo, dqn."""
    total_steps: int = 1_000_000
    """Steps in the environment, of each seed."""
    seeds: tuple[int, ...] = (0,)
    """Seeds. Several are learned side by side, each as if it were alone, and cost less together."""
    output: str = "runs/control"
    """Folder of this run: settings, metrics and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class ControlSettings(RecordSettings, Task):
    """Agents for Gymnasium environments: REINFORCE, A2C, PPO, DQN."""

    num_envs: int = 1
    """Environments of each seed, stepped together."""
    vectorization: Literal["local", "async", "gymnasium", "envpool"] = "local"
    """How they are stepped: one after the other (best where a step takes microseconds), a process each, by the
    environment's own vectorised version where it has one, or by envpool's threads (trueup[envpool])."""
    gamma: float = 0.99
    """Discount."""
    learning_rate: float = 3e-4
    """Learning rate at the start."""
    lr_schedule: Literal["constant", "linear"] = "linear"
    """Whether the learning rate stays, or falls to 0 at the end."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Optimiser."""
    optimizer_eps: float = 1e-5
    """What Adam and RMSprop add to the root of the mean square."""
    max_grad_norm: float | None = 0.5
    """Gradients with a larger norm are scaled down to it; None leaves them."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of each network."""
    activation: Literal["tanh", "relu"] = "tanh"
    """What follows each hidden layer."""
    minibatch_size: int = 64
    """Steps of experience in an optimiser step; 0 takes all of a rollout (not for dqn)."""
    eval_episodes: int = 20
    """Episodes of each evaluation, with --eval-every and at the end; 0 for none."""
    log_every: int = 1
    """Write metrics after every this many updates (dqn: every this many thousand steps)."""

    rollout_steps: int = 2048
    """Steps of each environment between two updates; for reinforce the longest episode."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation: 1 trusts what was earned, 0 the value network."""
    num_epochs: int = 10
    """Passes over each rollout."""
    surrogate: Literal["reinforce", "none", "clip", "kl", "adaptive_kl"] = "clip"
    """What is maximised: the log-probs; the ratio to the policy that acted, as it is, clipped, or with a penalty on
    the KL divergence from that policy, whose weight stays or is adapted to --kl-target."""
    clip: float = 0.2
    """Furthest that the ratio gains from moving away from 1."""
    clip_schedule: Literal["constant", "linear"] = "constant"
    """Whether --clip stays, or falls to 0 at the end."""
    kl_coef: float = 1.0
    """Weight β of the KL penalty; with adaptive_kl at the start."""
    kl_target: float = 0.01
    """KL divergence of an update that adaptive_kl aims at, in nats."""
    kl_stop: float | None = None
    """Leave out an update's remaining epochs once the policy has moved further than this, in nats (one seed only)."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy."""
    baseline: bool = True
    """Learn values, and judge actions by what they bring beyond them (reinforce can do without)."""
    value_coef: float = 0.5
    """Weight of the values' loss."""
    value_clip: float | None = None
    """Furthest that a value gains from moving in an update, in units of (scaled) returns; None: no bound."""
    normalize_advantages: Literal["none", "minibatch", "rollout"] = "minibatch"
    """Shift and scale advantages to mean 0 and spread 1, over each minibatch or each rollout."""
    normalize_observations: bool = False
    """Shift and scale observations by their running mean and spread, which are saved with the agent."""
    observation_clip: float = 10.0
    """Bound of normalised observations."""
    normalize_rewards: bool = False
    """Divide rewards by the running spread of the discounted return."""
    reward_clip: float = 10.0
    """Bound of scaled rewards."""
    log_std: float = 0.0
    """Log standard deviation of real-valued actions at the start; it is learned."""

    buffer_size: int = 50_000
    """Steps of experience that are kept (dqn)."""
    learning_starts: int = 1_000
    """Steps with random actions before the first update; the share's line falls meanwhile (dqn)."""
    train_every: int = 4
    """Steps between two rounds of updates (dqn)."""
    updates_per_round: int = 1
    """Optimiser steps in a round (dqn)."""
    target_every: int = 500
    """Steps between two copies of the network that the targets are computed with (dqn)."""
    exploration_first: float = 1.0
    """Share of random actions at the start (dqn)."""
    exploration_last: float = 0.05
    """Share of random actions from --exploration-share on (dqn)."""
    exploration_share: float = 0.2
    """Part of the run over which the share of random actions falls, counted from its first step (dqn)."""
    double: bool = True
    """The network chooses the best next action, its older copy says what it is worth (dqn)."""
    duelling: bool = False
    """Values and advantages as two heads of the network (dqn)."""
    huber_delta: float | None = None
    """Error from which on a target's pull no longer grows; None: the squared error, whose minimum is the mean of the
    targets. With a bound the values are off where targets are skewed, and can run away (dqn)."""
    n_step: int = 1
    """Rewards in a target before the value behind them (dqn)."""
    prioritized: bool = False
    """Draw experience by how far its last target was off (dqn)."""
    priority_alpha: float = 0.6
    """How strongly priorities count: 0 not at all, 1 in proportion (dqn)."""
    priority_beta: float = 0.4
    """How much of the bias that drawing by priority brings is weighed out, at the start; 1 at the end (dqn)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if not self.env:
            raise SettingsError("which environment?", where="--env", way_out="trueup control train CartPole-v1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise SettingsError("needs one seed or more, each once, none negative", where="--seeds")
        if not self.hidden or min(self.hidden) < 1:
            raise SettingsError("needs one width or more", where="--hidden")
        for name in (
            *("total_steps", "num_envs", "rollout_steps", "num_epochs", "log_every", "buffer_size", "train_every"),
            *("updates_per_round", "target_every", "n_step"),
        ):
            check_range(self, name, at_least=1)
        for name in (
            *("minibatch_size", "eval_episodes", "learning_starts", "entropy_coef", "value_coef", "kl_coef"),
            *("priority_alpha", "value_clip"),
        ):
            check_range(self, name, at_least=0)
        check_range(self, "learning_rate", above=0, below=math.inf)
        for name in (
            *("max_grad_norm", "kl_target", "kl_stop", "observation_clip", "reward_clip", "optimizer_eps"),
            "huber_delta",
        ):
            check_range(self, name, above=0)
        check_range(self, "clip", above=0, at_most=1)
        for name in (
            *("gamma", "gae_lambda", "exploration_first", "exploration_last", "exploration_share", "priority_beta"),
        ):
            check_range(self, name, at_least=0, at_most=1)
        learns_values = self.algorithm == "dqn"
        check_used(
            self,
            not learns_values,
            "an algorithm that learns from rollouts",
            *("rollout_steps", "gae_lambda", "num_epochs", "surrogate", "clip", "clip_schedule", "kl_coef"),
            *("kl_target", "kl_stop", "entropy_coef", "baseline", "value_coef", "value_clip", "normalize_advantages"),
            *("normalize_rewards", "reward_clip", "log_std", "normalize_observations", "observation_clip"),
        )
        check_used(
            self,
            learns_values,
            "--algorithm dqn",
            *("buffer_size", "learning_starts", "train_every", "updates_per_round", "target_every"),
            *("exploration_first", "exploration_last", "exploration_share", "double", "duelling", "n_step"),
            "huber_delta",
            *("prioritized", "priority_alpha", "priority_beta"),
        )
        if self.algorithm in ("reinforce", "a2c") and self.surrogate != "reinforce":
            raise SettingsError(f"has no effect on {self.algorithm}", where="--surrogate", way_out="--algorithm ppo")
        if self.algorithm == "ppo" and self.surrogate == "reinforce":
            raise SettingsError("is not PPO's", where="--surrogate", way_out="--algorithm a2c")
        if self.algorithm in ("reinforce", "a2c") and self.num_epochs > 1:
            raise SettingsError(
                f"{self.algorithm} learns from each step once: its loss holds for the policy that sampled only",
                where="--num-epochs",
                way_out="--num-epochs 1, or --algorithm ppo",
            )
        check_used(self, self.surrogate == "clip", "--surrogate clip", "clip", "clip_schedule")
        check_used(self, self.surrogate in ("kl", "adaptive_kl"), "--surrogate kl or adaptive_kl", "kl_coef")
        check_used(self, self.surrogate == "adaptive_kl", "--surrogate adaptive_kl", "kl_target")
        if self.kl_stop is not None and len(self.seeds) > 1:
            raise SettingsError(
                "would stop all seeds for one of them", where="--kl-stop", way_out="train each seed in a run of its own"
            )
        if not self.baseline and self.algorithm != "reinforce":
            raise SettingsError(f"is needed by {self.algorithm}", where="--baseline")
        check_used(self, self.baseline, "--baseline", "value_coef", "value_clip")
        check_used(self, self.normalize_observations, "--normalize-observations", "observation_clip")
        check_used(self, self.normalize_rewards, "--normalize-rewards", "reward_clip")
        check_used(self, self.prioritized, "--prioritized", "priority_alpha", "priority_beta")
        if learns_values and self.minibatch_size < 1:
            raise SettingsError("must be at least 1", where="--minibatch-size")


MAY_CHANGE = ("resume", "quiet", "output", "keep_checkpoints", "save_every", "tracker", "tracker_project", "eval_every")
"""What a resumed run may set otherwise than the run that it goes on with: nothing that changes what is learned."""
