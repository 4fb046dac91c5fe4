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


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with answers, and beside them ``closeness.py``, a reward that differs nearly everywhere."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "closeness.py").write_text(CLOSENESS)
    rows = ({"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(6))
    return write_rows(folder / "questions.jsonl", rows)


CLOSENESS = """
def closeness(completions, answer, **columns):
    return [sum(map(str.__eq__, said, right)) - len(said) / 8 for said, right in zip(completions, answer)]
"""


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
