"""trueup trains language models from preferences and rewards, and proves that it does it right."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trueup.recipes import dpo, preference, reward, rl, sft

__version__ = "0.1.0.dev0"
__all__ = ["__version__", "dpo", "preference", "reward", "rl", "sft"]


def __getattr__(name: str) -> Any:
    """Load the training functions when they are first asked for: ``import trueup`` stays instant."""
    if name in __all__:
        return getattr(import_module("trueup.recipes"), name)
    raise AttributeError(f"module 'trueup' has no attribute {name!r}")
