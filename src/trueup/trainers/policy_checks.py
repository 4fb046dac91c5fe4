"""What a user is told before an online run begins: what does not go together, and what will not do what it seems to."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from trueup.errors import SettingsError
from trueup.runs.settings import check_used
from trueup.trainers.algorithms import Algorithm
from trueup.trainers.policy_settings import PolicySettings


def check_fits(settings: PolicySettings, algorithm: Algorithm) -> None:
    """Raise ``SettingsError`` for settings that this algorithm can't follow, or that it has no use for."""
    if settings.group_size < algorithm.smallest_group:
        raise SettingsError(
            f"recipe {settings.recipe} compares at least {algorithm.smallest_group} completions of a prompt",
            where="--group-size",
            way_out=f"--group-size {algorithm.smallest_group} or more",
        )
    if settings.truncated_completions == "bootstrapped" and not algorithm.critic:
        raise SettingsError(
            "only a critic can say what a completion that was cut off would still have earned",
            where="--truncated-completions",
            way_out="take a recipe with a critic (ppo), or terminal or masked",
        )
    if settings.kl_coef > 0 and settings.kl_form == "reward" and not (algorithm.kl_in_reward or algorithm.reference):
        raise SettingsError(
            f"the advantages of recipe {settings.recipe} would not see a KL in the reward",
            where="--kl-form",
            way_out="--kl-form prefix_k3, for example, puts it into the loss",
        )
    if algorithm.reference and settings.kl_target is not None:
        raise SettingsError(
            f"β is part of the loss of recipe {settings.recipe} and stays", where="--kl-target", way_out="leave it out"
        )
    if algorithm.reference and settings.kl_coef == 0:
        raise SettingsError(f"recipe {settings.recipe} needs a β above 0", where="--kl-coef")
    critics = ("critic", "critic_learning_rate", "critic_warmup", "value_clip", "gae_lambda")
    check_used(settings, algorithm.critic, "a recipe with a critic (ppo)", *critics)


def warn(settings: PolicySettings, num_steps: int, say: Callable[[str], None]) -> None:
    """Say where a run of ``num_steps`` will not do what its settings seem to ask for."""
    if settings.sampling().cuts_support:
        cut = [name for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)) if getattr(settings, name) != off]
        warnings.warn(
            f"{', '.join(cut)} in training: tokens that are never sampled are never learned about, and what is learned "
            "of the others is off by the probability that was cut; leave it to evaluation and use",
            stacklevel=3,
        )
    if settings.warmup_steps >= num_steps:
        say(f"all {num_steps} steps are warm-up: the peak learning rate comes after step {settings.warmup_steps}")
    if settings.critic_warmup * settings.steps_per_rollout >= num_steps:
        say(f"all {num_steps} steps are warm-up of the critic: the policy stays as it is")
