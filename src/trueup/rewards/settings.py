"""Which rewards a run takes, as settings. Free of torch, so that ``--help`` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trueup.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class RewardChoice:
    """What scores the completions of a run."""

    reward: tuple[str, ...] = ()
    """Rewards, added up: a built-in (exact, regex:…, format, math, length:…, overlong:…, sentiment, code,
    reasoning-gym), your function (file.py:name or module:name), an http(s):// endpoint, or a reward model."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward in the sum; by default 1."""
    reward_timeout: float = 60.0
    """Seconds that one reward may take for one batch of completions."""

    def __post_init__(self) -> None:
        check_weights(self.reward_weights or None, len(self.reward))
        check_timeout(self.reward_timeout)


def check_weights(weights: tuple[float, ...] | None, num_rewards: int) -> None:
    """Raise ``SettingsError`` unless there are no weights, or a finite one for each reward."""
    if weights is None:
        return
    if len(weights) != num_rewards:
        raise SettingsError(f"{len(weights)} weights for {num_rewards} rewards", where="--reward-weights")
    if not all(math.isfinite(weight) for weight in weights):
        raise SettingsError(f"{weights} are not all finite numbers", where="--reward-weights")


def check_timeout(timeout: float) -> None:
    """Raise ``SettingsError`` for what is no time."""
    if not 0 < timeout < math.inf:
        raise SettingsError(f"{timeout} is out of range", where="--reward-timeout", way_out="give seconds, such as 60")
