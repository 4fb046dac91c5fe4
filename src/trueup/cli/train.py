"""``trueup sft``, ``reward``, ``preference`` and ``dpo``: the training loops on the command line.

Importing this file is quick, so that ``--help`` is: a loop, and PyTorch with it, is loaded when its command runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trueup import recipes
from trueup.trainers.settings import PreferenceSettings, RewardSettings, SFTSettings

if TYPE_CHECKING:
    from trueup.trainers.session import RunResult

__all__ = ["PreferenceSettings", "RewardSettings", "SFTSettings", "dpo_defaults", "preference", "reward", "sft"]


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


def dpo_defaults() -> PreferenceSettings:
    """What ``trueup dpo`` sets otherwise than ``trueup preference``."""
    return PreferenceSettings(**recipes.DPO)


def _tell(result: RunResult) -> None:
    """Where the run lies and what it measured last."""
    print(f"run {result.folder}, model {result.model_folder}")
