"""``trueup sft``, ``reward``, ``preference``, ``rl`` and their presets: the training loops on the command line.

Importing this file is quick, so that ``--help`` is: a loop, and PyTorch with it, is loaded when its command runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from trueup import recipes
from trueup.errors import SettingsError
from trueup.runs.settings import given_value
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.settings import PreferenceSettings, RewardSettings, SFTSettings

if TYPE_CHECKING:
    from trueup.trainers.session import RunResult

__all__ = ["PolicySettings", "PreferenceSettings", "RewardSettings", "SFTSettings", "preference", "reward", "rl", "sft"]


def sft(settings: SFTSettings) -> None:
    """Fine-tune on demonstrations."""
    from trueup.trainers.sft import train_sft

    _tell(train_sft(settings))


def reward(settings: RewardSettings) -> None:
    """Train a reward model."""
    from trueup.trainers.reward import train_reward

    _tell(train_reward(settings))


def preference(settings: PreferenceSettings) -> None:
    """Fit a model to preferences."""
    from trueup.trainers.preference import train_preference

    _tell(train_preference(settings))


def rl(settings: PolicySettings) -> None:
    """Improve a model against rewards."""
    from trueup.trainers.policy import train_policy

    _tell(train_policy(settings, recipes.recipe_named(settings.recipe).algorithm()))


def dpo_defaults(argv: Sequence[str]) -> PreferenceSettings:
    """What ``trueup dpo`` sets otherwise than ``trueup preference``."""
    return PreferenceSettings(**recipes.DPO)


def rl_defaults(argv: Sequence[str], recipe: str = "") -> PolicySettings:
    """What the recipe sets, which is the verb's, or is named among the flags or in the file that they name.

    Raises ``SettingsError`` for a recipe that there is not, for one that is not the verb's, and for a file that can't
    be read.
    """
    named = given_value(argv, "recipe", PolicySettings)
    if named and recipe and named != recipe:
        raise SettingsError(
            f"is {named}, but the command is trueup {recipe}",
            where="--recipe",
            way_out=f"trueup rl --recipe {named}, or with the same --config",
        )
    return PolicySettings(**recipes.policy_defaults(named or recipe or PolicySettings.recipe))


reinforce_defaults, rloo_defaults, ppo_defaults, grpo_defaults = (
    partial(rl_defaults, recipe=name) for name in ("reinforce", "rloo", "ppo", "grpo")
)


def rl_notes() -> str:
    """The table of recipes, for --help."""
    width = max(map(len, recipes.RECIPES))
    rows = "\n".join(f"  {name:{width}}  {recipe.summary}" for name, recipe in recipes.RECIPES.items())
    return f"\n\nRecipes (--recipe), whose settings are the defaults shown below:\n{rows}"


def _tell(result: RunResult) -> None:
    """Where the run lies and what it measured last."""
    print(f"run {result.folder}, model {result.model_folder}")
