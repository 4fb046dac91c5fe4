"""Typed errors. Each says where, what and the way out; the command line turns them into exit code 2."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class TrueupError(Exception):
    """A mistake that the user can mend.

    ``what`` happened, ``where`` (file and line, config key, column, sample), and the ``way_out``.
    """

    def __init__(self, what: str, *, where: str | None = None, way_out: str | None = None) -> None:
        self.what, self.where, self.way_out = what, where, way_out
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  → {self.way_out}" if self.way_out else head


class SettingsError(TrueupError):
    """An unknown, missing, contradictory or out-of-range setting."""


class DataError(TrueupError):
    """A file or row that can't be read as what it should be."""


class ModelError(TrueupError):
    """A model, tokenizer or template that can't be loaded or used."""


class CheckpointError(TrueupError):
    """A run folder or checkpoint that is missing, cut short or belongs to other settings."""


class NonFiniteError(TrueupError):
    """Too many losses or gradients that are not finite numbers."""


class RewardError(TrueupError):
    """A reward that raises, hangs, or gives what is no score; the message names it and the sample.

    ``sample``: the index of the sample, from where its place is not known; whoever knows the samples fills it in.
    """

    def __init__(
        self, what: str, *, where: str | None = None, way_out: str | None = None, sample: int | None = None
    ) -> None:
        self.sample = sample
        super().__init__(what, where=where, way_out=way_out)


class OutOfMemoryError(TrueupError):
    """An allocation failed; the message says what to lower, and to what."""


class MissingExtraError(TrueupError):
    """An optional package is needed; the message names the extra that brings it."""


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say in one line which extra brings it.

    Raises ``MissingExtraError``.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise missing_extra(module, extra) from error


def check_extra(module: str, extra: str) -> None:
    """As ``require_extra``, but without importing what is there: for packages that another process needs."""
    if importlib.util.find_spec(module) is None:
        raise missing_extra(module, extra)


def missing_extra(module: str, extra: str) -> MissingExtraError:
    return MissingExtraError(
        f"this needs the package '{module.split('.')[0]}', which is not installed",
        way_out=f"pip install 'trueup[{extra}]'",
    )
