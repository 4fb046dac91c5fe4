"""The scripts of ``benchmarks/``: they lie beside their modules and are no package."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def bench() -> Iterator[ModuleType]:
    """``run.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("run")


@pytest.fixture(scope="session")
def rollout(bench: ModuleType) -> ModuleType:
    """``rollout.py``."""
    return importlib.import_module("rollout")
