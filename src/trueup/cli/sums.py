"""The demo's problems: sums of two numbers below 100, and people who add without carrying."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

CHARACTERS = "0123456789+="
MOST_TOKENS = 4
"""In an answer: three digits and the end."""
NUM_HELD_OUT = 1000


@dataclass(frozen=True)
class Problem:
    """``a + b`` with both numbers below 100."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def right(self) -> str:
        return str(self.a + self.b)

    @property
    def carry_forgotten(self) -> str:
        """The sum as somebody writes it who adds column by column and carries nothing: the same for 30 % of all."""
        return str((self.a // 10 + self.b // 10) % 10 * 10 + (self.a % 10 + self.b % 10) % 10)


def problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """All 10,000 sums in a random order: (9,000 to learn from, 1,000 held out)."""
    every = [Problem(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(every)
    return every[NUM_HELD_OUT:], every[:NUM_HELD_OUT]


def write_data(folder: Path, seed: int, mistakes: float) -> dict[str, Path]:
    """``demonstrations``, in which carries are often forgotten; ``prompts`` and ``held_out``, with the answer."""
    train, held_out = problems(seed)
    draw = random.Random(seed + 1)
    rows = {
        "demonstrations": (
            {"prompt": p.prompt, "completion": p.carry_forgotten if draw.random() < mistakes else p.right}
            for p in train
        ),
        "prompts": ({"prompt": p.prompt, "answer": p.right} for p in train),
        "held_out": ({"prompt": p.prompt, "answer": p.right} for p in held_out),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return {name: write_rows(folder / f"{name}.jsonl", each) for name, each in rows.items()}


def write_rows(file: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
