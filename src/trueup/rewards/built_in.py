"""The built-in rewards by name, each made from the parameters behind its name."""

from __future__ import annotations

from collections.abc import Callable

from trueup.rewards.calls import RewardFunction

BUILT_IN: dict[str, Callable[[str], RewardFunction]] = {}
"""``NAME:PARAMETERS`` → the function. Each raises ``SettingsError`` for parameters that it doesn't have."""
