"""``trueup demo``: a tiny model from nothing through supervised fine-tuning, a reward model and DPO."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.runs.settings import check_range
from trueup.trainers.settings import PreferenceSettings, RewardSettings, SFTSettings, TrainSettings

if TYPE_CHECKING:
    from trueup.trainers.session import RunResult

DIGITS_AND_SIGNS = "0123456789+="


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """A tiny model learns to add: badly from people who often forget to carry, better from comparisons of answers."""

    output: str = ""
    """Folder of the demo; by default runs/demo-TIME."""
    seed: int = 0
    """Seed of everything random."""
    sft_steps: int = 600
    """Optimiser steps of supervised fine-tuning."""
    reward_steps: int = 150
    """Optimiser steps of the reward model."""
    dpo_steps: int = 150
    """Optimiser steps of DPO, and of DPO with likelihood."""
    mistakes: float = 0.6
    """Share of the demonstrations with a carry in which it is forgotten."""
    quiet: bool = False
    """Show no progress, only the table."""

    def __post_init__(self) -> None:
        for name in ("sft_steps", "reward_steps", "dpo_steps"):
            check_range(self, name, at_least=1)
        check_range(self, "mistakes", at_least=0, at_most=1)


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
        """The sum as somebody writes it who adds the columns and forgets to carry."""
        return str(10 * (self.a // 10 + self.b // 10) + (self.a % 10 + self.b % 10) % 10)

    @property
    def wrong(self) -> str:
        """The carry forgotten; where there is none, one carried all the same.

        Mistakes go both ways: pairs in which the better sum is always the larger one would teach "more".
        """
        return self.carry_forgotten if self.carry_forgotten != self.right else str(self.a + self.b + 10)


@dataclass(frozen=True)
class Stage:
    """One line of the table."""

    name: str
    folder: Path
    answers: list[str] | None = None
    """What the model writes after each held-out prompt; None for a model that writes nothing."""
    pairs: tuple[float, float, float] | None = None
    """Share of held-out pairs that it ranks right, with its interval."""
    seconds: float = 0.0


def demo(settings: DemoSettings) -> None:
    """Run the demo and print its table. All that it leaves lies in its folder."""
    folder = Path(settings.output or f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}")
    with cache_in(folder / "cache"):
        run_stages(settings, folder)


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """What runs keep for other runs goes into this folder, not into the user's cache."""
    before = os.environ.get("TRUEUP_CACHE")
    os.environ["TRUEUP_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["TRUEUP_CACHE"]
        if before is not None:
            os.environ["TRUEUP_CACHE"] = before


def run_stages(settings: DemoSettings, folder: Path) -> None:
    """Train one stage after the other, and print what each has learned."""
    from rich.console import Console

    from trueup.models.scratch import make_model
    from trueup.trainers.preference import train_preference
    from trueup.trainers.reward import train_reward
    from trueup.trainers.sft import train_sft

    console = Console(highlight=False)
    train, held_out = problems(settings.seed)
    files = write_data(folder / "data", train, held_out, settings)
    base = make_model(
        folder / "base", characters=DIGITS_AND_SIGNS, hidden_size=96, num_layers=2, num_heads=4, seed=settings.seed
    )
    shared = {"seed": settings.seed, "quiet": settings.quiet, "max_length": 16, "tokens_per_batch": 16384}
    shared |= {"num_epochs": 1000, "num_samples": 8, "sample_tokens": 4}
    stages = [Stage("untrained", base, written_answers(base, held_out))]

    def stage(name: str, verb: str, train: Callable[..., RunResult], stage_settings: TrainSettings) -> Path:
        console.print(f"\n[bold]{name}[/bold]\n  {command_line(verb, stage_settings)}", soft_wrap=True)
        began = time.perf_counter()
        result = train(stage_settings)
        seconds = time.perf_counter() - began
        answers = None if verb == "reward" else written_answers(result.model_folder, held_out)
        stages.append(Stage(name, result.folder, answers, pair_accuracy(result.metrics), seconds))
        return result.model_folder

    sft_model = stage(
        "supervised fine-tuning",
        "sft",
        train_sft,
        SFTSettings(
            model=str(base),
            data=(str(files["demonstrations"]),),
            output=str(folder / "sft"),
            max_steps=settings.sft_steps,
            batch_size=256,
            learning_rate=3e-3,
            warmup_steps=50,
            **shared,
        ),
    )
    on_pairs = {"model": str(sft_model), "data": (str(files["pairs"]),), "eval_data": (str(files["held_out_pairs"]),)}
    stage(
        "reward model",
        "reward",
        train_reward,
        RewardSettings(
            **on_pairs,
            output=str(folder / "reward"),
            max_steps=settings.reward_steps,
            batch_size=128,
            learning_rate=1e-3,
            **shared,
        ),
    )
    stage(
        "DPO",
        "preference",
        train_preference,
        PreferenceSettings(
            **on_pairs,
            output=str(folder / "dpo"),
            beta=3.0,
            max_steps=settings.dpo_steps,
            batch_size=128,
            learning_rate=1e-5,
            **shared,
        ),
    )
    stage(
        "DPO with likelihood",
        "preference",
        train_preference,
        PreferenceSettings(
            **on_pairs,
            output=str(folder / "rpo"),
            loss=("rpo",),
            max_steps=settings.dpo_steps,
            batch_size=128,
            learning_rate=3e-4,
            **shared,
        ),
    )
    print_table(console, stages, held_out, folder)


def problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """All 10,000 sums of two numbers below 100, 500 of them held out."""
    every = [Problem(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(every)
    return every[500:], every[:500]


def write_data(folder: Path, train: list[Problem], held_out: list[Problem], settings: DemoSettings) -> dict[str, Path]:
    """Demonstrations, in which carries are often forgotten, and pairs: the right sum against a wrong carry."""
    draw = random.Random(settings.seed + 1)

    def demonstration(problem: Problem) -> dict[str, str]:
        forgotten = draw.random() < settings.mistakes
        return {"prompt": problem.prompt, "completion": problem.carry_forgotten if forgotten else problem.right}

    def pair(problem: Problem) -> dict[str, str]:
        return {"prompt": problem.prompt, "chosen": problem.right, "rejected": problem.wrong}

    rows = {
        "demonstrations": [demonstration(problem) for problem in train],
        "pairs": [pair(problem) for problem in train],
        "held_out_pairs": [pair(problem) for problem in held_out],
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
    return files


def written_answers(model_folder: Path, held_out: list[Problem]) -> list[str]:
    """What the model writes, greedily, after each held-out prompt."""
    import numpy as np

    from trueup.data.chat import stop_token_ids
    from trueup.models.load import load_model
    from trueup.rollout.torch_engine import TorchEngine
    from trueup.trainers.samples import greedy_completions

    loaded = load_model(model_folder, device="cpu")
    prompts = [np.array(loaded.tokenizer(p.prompt, add_special_tokens=False).input_ids) for p in held_out]
    stop_tokens = stop_token_ids(loaded.tokenizer)
    engine = TorchEngine(loaded.model, dtype="same")
    written = greedy_completions(engine, prompts, stop_tokens=stop_tokens, max_new_tokens=4)
    return [str(loaded.tokenizer.decode(tokens)).strip() for tokens in written]


def pair_accuracy(metrics: dict[str, Any]) -> tuple[float, float, float] | None:
    """(mean, low, high) of the last evaluation, by the name that the loop gives it; None without pairs."""
    for name in ("eval_accuracy", "eval_rewards/accuracies"):
        if name in metrics:
            return metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]
    return None


def command_line(verb: str, settings: TrainSettings) -> str:
    """The command that does what these settings do: a flag for every value that is not the default."""
    from trueup.runs.settings import flag_name

    words = ["trueup", verb]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == field.default or field.name == "quiet":
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [flag_name(field.name), *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return " ".join(words)


def print_table(console: Any, stages: list[Stage], held_out: list[Problem], folder: Path) -> None:
    """One line a stage: its share of right sums and of pairs ranked right, and what it makes of one sum."""
    from rich.table import Table

    from trueup.runs.statistics import accuracy_interval

    def percent(estimate: tuple[float, float, float]) -> str:
        mean, low, high = (100 * value for value in estimate)
        return f"{mean:.1f} % ({low:.0f}–{high:.0f})"

    def num_right(index: int) -> int:
        return sum(stage.answers[index] == held_out[index].right for stage in stages if stage.answers)

    # The sum that only the last stages get right tells most.
    example = min(
        (i for i, p in enumerate(held_out) if stages[-1].answers and stages[-1].answers[i] == p.right),
        key=num_right,
        default=0,
    )
    table = Table(title=f"\n{len(held_out)} held-out sums, 95 % intervals")
    for column in ("stage", "sums right", "pairs ranked right", held_out[example].prompt, "seconds", "run"):
        table.add_column(column, justify="left" if column in ("stage", "run") else "right")
    for stage in stages:
        right = [float(answer == p.right) for answer, p in zip(stage.answers or [], held_out, strict=False)]
        table.add_row(
            stage.name,
            percent(accuracy_interval(right)) if right else "",
            percent(stage.pairs) if stage.pairs else "",
            stage.answers[example] if stage.answers else "",
            f"{stage.seconds:.0f}",
            stage.folder.name,
        )
    console.print(table)
    console.print(
        f"All of it lies in {folder}: of each run its settings, metrics.jsonl, samples.jsonl and checkpoints/, whose\n"
        "model loads with transformers. DPO looks at the difference between two answers only, so both may become less\n"
        "likely; with the likelihood of the better one beside it (--loss rpo) that one is held up.\n"
        "Next: a real model on real preferences, see README.md.",
        soft_wrap=True,
    )
