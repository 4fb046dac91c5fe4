"""What the two sides and the runner agree on: the arguments of a side, the files it reads and the lines it prints.

Only the standard library, so that it imports in either environment and in neither.

A side is called as ``python SIDE.py OBJECTIVE --work FOLDER …`` and prints one JSON object a line: for every optimiser
step ``{"step", "loss", "grad_norm", "seconds"}``, and last ``{"imported_mib", "peak_mib"}``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OBJECTIVES = ("dpo", "sft", "reward")
PRECISIONS = ("float32", "bfloat16")

# One recipe for both sides: constant learning rate, no weight decay, gradient clipping as both have it by default.
LEARNING_RATE = 1e-4
BETAS = (0.9, 0.999)
EPSILON = 1e-8
MAX_GRAD_NORM = 1.0
DPO_BETA = 0.1


@dataclass(frozen=True, kw_only=True)
class Work:
    """The folder that ``prepare.py`` fills once and both sides read.

    The reference of DPO is another random draw than the policy: with equal ones the first loss is log 2 whatever the
    log-probs are, and would prove nothing.
    """

    folder: Path

    @property
    def policy(self) -> Path:
        return self.folder / "policy"

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    @property
    def reward_model(self) -> Path:
        return self.folder / "reward-model"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.json"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Token ids of one preference pair. SFT reads the prompt and the chosen side only."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def read_pairs(work: Work) -> list[Pair]:
    """The pairs of every step, in the order in which both sides train on them."""
    return [Pair(**fields) for fields in json.loads(work.pairs.read_text(encoding="utf-8"))]


def write_pairs(work: Work, pairs: Sequence[Pair]) -> None:
    work.pairs.write_text(json.dumps([vars(pair) for pair in pairs]), encoding="utf-8")


def side_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every side takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("objective", choices=OBJECTIVES)
    parser.add_argument("--work", type=lambda text: Work(folder=Path(text)), required=True)
    parser.add_argument("--num-steps", type=int, required=True, help="optimiser steps, the warm-up ones inside")
    parser.add_argument("--batch-size", type=int, required=True, help="pairs (or rows) of one optimiser step")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--threads", type=int, required=True)
    return parser


def emit(**fields: Any) -> None:
    """Print one line for the runner."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def resident_mib() -> float:
    """Resident memory of this process now, in MiB; NaN where there is no ``/proc``."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mib() -> float:
    """The most resident memory that this process ever had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
