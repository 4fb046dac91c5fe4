"""What the two sides and the runner agree on: the arguments of a side, the files it reads and the lines it prints.

Only the standard library, so that it imports in either environment and in neither; what waits for a GPU or asks for its
memory takes the PyTorch of the side that calls it.

A side is called as ``python SIDE.py OBJECTIVE --work FOLDER …`` and prints one JSON object a line: for every optimiser
step ``{"step", "loss", "grad_norm", "seconds"}`` (of GRPO also ``"parts"``, how the seconds are divided), and last
``{"imported_mib", "peak_mib"}``. A side of the rollout benchmark prints ``{"tokens", "seconds"}`` for every rollout in
place of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

OFFLINE = ("dpo", "sft", "reward")
OBJECTIVES = (*OFFLINE, "grpo")
PRECISIONS = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")


class Size(NamedTuple):
    """Of a Llama with random weights, everything but its vocabulary, as LlamaConfig calls it."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


SIZES = {
    "tiny": Size(64, 2, 2, 2, 128),  # for tests
    "288x6": Size(288, 6, 6, 6, 768),
    "288x6-9-heads": Size(288, 6, 9, 9, 768),  # of 32 dimensions: vLLM has no kernel for 48
    "0.5b": Size(896, 24, 14, 2, 4864),  # as Qwen2.5-0.5B
    "1.5b": Size(1536, 28, 12, 2, 8960),  # as Qwen2.5-1.5B
}

# One recipe for both sides: constant learning rate, no weight decay, gradient clipping as both have it by default.
LEARNING_RATE = 1e-4
BETAS = (0.9, 0.999)
EPSILON = 1e-8
MAX_GRAD_NORM = 1.0
DPO_BETA = 0.1


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is sampled: completions of exactly ``new_tokens`` tokens behind prompts of random ones."""

    shortest: int
    """Tokens of the shortest prompt; the lengths rise evenly to ``longest``."""
    longest: int
    group_size: int
    """Completions of each prompt."""
    vocabulary: int
    num_prompts: int = 8
    new_tokens: int = 64

    @property
    def num_completions(self) -> int:
        return self.num_prompts * self.group_size

    @property
    def num_tokens(self) -> int:
        """Tokens that one rollout writes."""
        return self.num_completions * self.new_tokens

    @property
    def end_token(self) -> int:
        """No side stops at it."""
        return self.vocabulary - 1

    @property
    def padding_token(self) -> int:
        return self.vocabulary - 2

    def prompts(self, number: int = 0) -> list[list[int]]:
        """The prompts of rollout ``number``; no two share a beginning that could be kept from one to the next."""
        draw = random.Random(number)
        steps = max(1, self.num_prompts - 1)
        lengths = [self.shortest + (self.longest - self.shortest) * i // steps for i in range(self.num_prompts)]
        return [[draw.randrange(self.padding_token) for _ in range(length)] for length in lengths]


CASES = {
    "short-32k": Case(shortest=32, longest=96, group_size=8, vocabulary=32_000),
    "short-512": Case(shortest=32, longest=96, group_size=8, vocabulary=512),
    "long-32k": Case(shortest=512, longest=512, group_size=16, vocabulary=32_000),
    "large-152k": Case(shortest=128, longest=512, group_size=8, vocabulary=151_936, num_prompts=16, new_tokens=256),
}
CPU_CASES = ("short-32k", "short-512", "long-32k")
"""The last one is for a GPU."""


def as_text(tokens: Sequence[int]) -> str:
    """What the tokenizer of the online cases reads as these tokens."""
    return " ".join(map(word, tokens))


def word(token: int) -> str:
    return f"t{token}"


NO_SIGNAL = "the completions of a prompt all have the same score"
"""There would be nothing to learn from: a side that leaves such a group out would look fast."""


def score(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """The reward of the online cases, called as both sides call a reward: cheap, the same for the same tokens, and
    almost never equal for all completions of a prompt."""
    return [sum(int(token) % 1009 for token in tokens) / (1009 * len(tokens)) for tokens in completion_ids]


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

    def of_case(self, name: str) -> Work:
        """Where the models of an online case lie: each has a vocabulary of its own."""
        return Work(folder=self.folder / name)


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


@dataclass(frozen=True, kw_only=True)
class OnlineStep:
    """What one online step of the peer learned from: prompts, their completions and scores, all as lists by prompt."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    scores: list[list[float]]


def read_steps(path: Path) -> list[OnlineStep]:
    return [OnlineStep(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def add_step(path: Path, step: OnlineStep) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(vars(step)) + "\n")


def side_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every side takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("objective", choices=OBJECTIVES)
    parser.add_argument("--work", type=lambda text: Work(folder=Path(text)), required=True)
    parser.add_argument("--num-steps", type=int, required=True, help="optimiser steps, the warm-up ones inside")
    parser.add_argument(
        "--batch-size", type=int, help="pairs (or rows) of one optimiser step; of GRPO the case says it"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--case", choices=tuple(CASES), help="GRPO only: what is sampled")
    parser.add_argument("--kl-coef", type=float, default=0.0, help="GRPO only: β of the KL to the reference")
    parser.add_argument("--steps-file", type=Path, help="GRPO only: the peer's steps, for the check that both agree")
    return parser


def emit(**fields: Any) -> None:
    """Print one line for the runner."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def wait_for(device: str) -> None:
    """Return when the device has done all that it was asked for: before a clock stops."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def used_mib(device: str) -> float:
    """Memory now, in MiB: resident in this process, NaN where there is no ``/proc``; of a GPU what PyTorch took."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated() / 2**20
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mib(device: str) -> float:
    """The same at its peak. Of resident memory each living child process adds its own peak."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    own = peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    return own + sum(map(_peak_of, _children(os.getpid())))


def _children(process: int | str) -> list[str]:
    """The processes below this one; none where there is no ``/proc``."""
    found = [pid for file in Path(f"/proc/{process}/task").glob("*/children") for pid in file.read_text().split()]
    return found + [below for pid in found for below in _children(pid)]


def _peak_of(process: str) -> float:
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) / 2**10 for line in status if line.startswith("VmHWM:"))
