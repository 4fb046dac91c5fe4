"""A model small enough that a whole training run takes a second, and data for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from trueup.models.scratch import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_model(folder, characters="0123456789+=", hidden_size=16, num_layers=2, num_heads=2, seed=3)


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, Any]]:
    return [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(4) for b in range(6)
    ]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory, pairs: list[dict[str, Any]]) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
