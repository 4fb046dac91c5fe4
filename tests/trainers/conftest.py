"""A model small enough that a whole training run takes a second, and data for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trueup.models.scratch import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return str(make_model(folder, characters="0123456789+=", hidden_size=16, num_layers=2, num_heads=2, seed=3))


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, str]]:
    return [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(4) for b in range(6)
    ]


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "run")
