"""``trueup demo``: a tiny model from nothing through all of RLHF, and four ways to its last stage side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.cli import sums
from trueup.runs.settings import check_range

if TYPE_CHECKING:
    import numpy as np


MODEL: dict[str, Any] = {"hidden_size": 128, "num_layers": 3, "num_heads": 4}
SHORT: dict[str, Any] = {"max_length": 16, "tokens_per_batch": 16384, "dtype": "float32"}
"""Of all stages. So small a model is no slower in float32, and learns the same on every machine."""
SFT: dict[str, Any] = SHORT | {
    "num_epochs": 1000,
    "batch_size": 64,
    "learning_rate": 1.5e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 100,
    "num_samples": 0,
}


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """A tiny model learns to add: badly from people who forget to carry, better from comparisons and rewards."""

    output: str = ""
    """Folder of the demo; by default runs/demo-TIME."""
    seed: int = 0
    """Seed of everything random."""
    sft_steps: int = 1200
    """Optimiser steps of supervised fine-tuning."""
    reward_steps: int = 200
    """Optimiser steps of the reward model."""
    dpo_steps: int = 200
    """Optimiser steps of DPO."""
    ppo_steps: int = 120
    """Optimiser steps of PPO against the reward model: with more, or less KL, it finds what that model overrates."""
    rl_steps: int = 150
    """Optimiser steps of GRPO and REINFORCE against the verifier."""
    mistakes: float = 0.7
    """Share of the demonstrations that are added without carrying."""
    quiet: bool = False
    """Show no progress, only the table."""

    def __post_init__(self) -> None:
        for name in ("sft_steps", "reward_steps", "dpo_steps", "ppo_steps", "rl_steps"):
            check_range(self, name, at_least=1)
        check_range(self, "mistakes", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one command left, and how long it took."""

    name: str
    folder: Path
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A policy on the held-out sums, [P] each."""

    answers: list[str]
    """The likeliest answer to each."""
    right: list[bool]
    """Whether it is the sum."""
    scores: np.ndarray
    """What the reward model says of one sampled answer to each."""
    kl: np.ndarray
    """log π − log π_SFT of these samples, in nats per answer: its mean estimates the KL."""


def demo(settings: DemoSettings) -> dict[str, Measured]:
    """Run the demo, print its table, and return what it says of every policy. All that it leaves lies in its folder."""
    folder = Path(settings.output or f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}")
    with cache_in(folder / "cache"):
        return run_stages(settings, folder)


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


def run_stages(settings: DemoSettings, folder: Path) -> dict[str, Measured]:
    """One command after the other, then what each model has learned."""
    from rich.console import Console

    from trueup.cli.main import COMMANDS
    from trueup.models.scratch import make_model

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # the table is for reading in a log too
    data = sums.write_data(folder / "data", settings.seed, settings.mistakes)
    base = make_model(folder / "base", characters=sums.CHARACTERS, seed=settings.seed, **MODEL)
    stages = {"untrained": Stage(name="untrained", folder=base)}

    def run(name: str, verb: str, **given: Any) -> str:
        """Do what the command does, and return where it wrote."""
        command = COMMANDS[verb]
        module = import_module(command.module)
        default = getattr(module, command.defaults)([]) if command.defaults else getattr(module, command.settings)()
        told = replace(
            default, **{"seed": settings.seed} if hasattr(default, "seed") else {}, quiet=settings.quiet, **given
        )
        console.print(f"\n[bold]{name}[/bold]\n  {command_line(verb, told, default)}", soft_wrap=True)
        began = time.perf_counter()
        getattr(module, command.run)(told)
        stages[name] = Stage(name=name, folder=Path(told.output), seconds=time.perf_counter() - began)
        return told.output

    def at(name: str) -> str:
        return str(folder / name)

    sft = run(
        "supervised fine-tuning",
        "sft",
        model=str(base),
        data=(str(data["demonstrations"]),),
        output=at("sft"),
        max_steps=settings.sft_steps,
        **SFT,
    )
    samples = run(
        "two answers to each sum",
        "sample",
        model=sft,
        data=(str(data["prompts"]),),
        output=at("samples.jsonl"),
        num_completions=2,
        max_new_tokens=sums.MOST_TOKENS,
        prompts_per_part=1500,
    )
    pairs = run("which is better?", "pairs", data=(samples,), reward=("exact",), output=at("pairs.jsonl"))
    compared = SHORT | {"data": (pairs,), "holdout": 0.1, "num_samples": 0, "num_epochs": 1000, "batch_size": 128}
    judge = run(
        "reward model",
        "reward",
        model=sft,
        output=at("reward"),
        max_steps=settings.reward_steps,
        learning_rate=1e-3,
        **compared,
    )
    run(
        "DPO",
        "preference",
        model=sft,
        output=at("dpo"),
        max_steps=settings.dpo_steps,
        loss=("rpo",),  # DPO, and the chosen answer's likelihood: alone it lets both answers become unlikely
        beta=0.3,
        learning_rate=1e-4,
        **compared,
    )
    online = SHORT | {
        "model": sft,
        "data": (str(data["prompts"]),),
        "max_new_tokens": sums.MOST_TOKENS,
        "max_steps": settings.rl_steps,
        "learning_rate": 5e-4,
        "lr_schedule": "cosine",
        "warmup_steps": 10,
    }
    run(
        "PPO, reward model",
        "ppo",
        reward=(judge,),
        output=at("ppo"),
        batch_size=512,
        num_mini_batches=2,
        inner_epochs=1,
        critic_learning_rate=1e-3,
        **(online | {"max_steps": settings.ppo_steps, "learning_rate": 3e-4, "kl_coef": 1.0}),
    )
    run("GRPO, verifier", "grpo", reward=("exact",), output=at("grpo"), batch_size=64, **online)
    run("REINFORCE, verifier", "reinforce", reward=("exact",), output=at("reinforce"), batch_size=512, **online)
    _, held_out = sums.problems(settings.seed)
    policies = measured(stages, held_out, sft, judge)
    print_table(console, stages, policies, held_out, folder)
    return policies


POLICIES = ("untrained", "supervised fine-tuning", "DPO", "PPO, reward model", "GRPO, verifier", "REINFORCE, verifier")
"""The stages that write answers."""


def measured(
    stages: Mapping[str, Stage], held_out: Sequence[sums.Problem], sft: str, judge: str
) -> dict[str, Measured]:
    """Every policy on the held-out sums, by the name of its stage."""
    import numpy as np

    from trueup.data.chat import stop_token_ids
    from trueup.models.load import load_model
    from trueup.models.scorer import prepare_scorer
    from trueup.rewards.rewards import Rewards
    from trueup.rewards.samples import Samples
    from trueup.rollout.settings import SamplingParams
    from trueup.rollout.torch_engine import TorchEngine
    from trueup.trainers.reference import computed_logprobs

    reward_model = Rewards.load([judge])
    start = load_model(sft, device="cpu")
    reference = prepare_scorer(start.model).eval()
    tokenizer = start.tokenizer
    prompts = [np.array(tokenizer(p.prompt, add_special_tokens=False).input_ids) for p in held_out]
    ending = {"max_new_tokens": sums.MOST_TOKENS, "stop_tokens": tuple(stop_token_ids(tokenizer))}

    def text(completion: Any) -> str:
        return str(tokenizer.decode(completion.tokens, skip_special_tokens=True)).strip()

    def measure(folder: Path) -> Measured:
        model = load_model(folder, device="cpu").model
        engine = TorchEngine(model)
        likeliest = engine.generate(prompts, SamplingParams(temperature=0, **ending))
        sampled = engine.generate(prompts, SamplingParams(seed=1, **ending))
        policy = prepare_scorer(model).eval()
        gained = [
            sum(of_policy) - sum(of_reference)
            for of_policy, of_reference in zip(
                computed_logprobs(policy, sampled), computed_logprobs(reference, sampled), strict=True
            )
        ]
        written = [group.completions[0] for group in sampled]
        scores = reward_model.score(
            Samples(
                prompts=[p.prompt for p in held_out],
                completions=[text(completion) for completion in written],
                completion_ids=[completion.tokens for completion in written],
                truncated=[completion.truncated for completion in written],
            )
        )
        answers = [text(group.completions[0]) for group in likeliest]
        right = [answer == p.right for answer, p in zip(answers, held_out, strict=True)]
        return Measured(answers=answers, right=right, scores=scores.total, kl=np.array(gained))

    return {name: measure(stages[name].folder) for name in POLICIES}


def command_line(verb: str, settings: Any, default: Any) -> str:
    """The command that does what these settings do: a flag for every value that is not the command's default."""
    from trueup.runs.settings import flag_name

    words = ["trueup", verb]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == getattr(default, field.name) or field.name == "quiet":
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [flag_name(field.name), *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return " ".join(words)


def print_table(
    console: Any,
    stages: Mapping[str, Stage],
    policies: Mapping[str, Measured],
    held_out: Sequence[sums.Problem],
    folder: Path,
) -> None:
    """One line a stage: how many sums are right, what the reward model thinks, how far it went, what it cost."""
    from rich.table import Table

    from trueup.runs.folder import read_metrics
    from trueup.runs.statistics import accuracy_interval

    def percent(estimate: tuple[float, float, float]) -> str:
        mean, low, high = (100 * value for value in estimate)
        return f"{mean:.1f} % ({low:.0f}–{high:.0f})"

    def last(stage: Stage, metric: str) -> float | None:
        file = stage.folder / "metrics.jsonl"
        values = [line[metric] for line in read_metrics(file) if metric in line] if file.exists() else []
        return values[-1] if values else None

    # The sum that most of the later stages get right and the first ones don't tells most.
    gained = [
        sum(policies[name].right[i] for name in POLICIES[2:]) - sum(policies[name].right[i] for name in POLICIES[:2])
        for i in range(len(held_out))
    ]
    example = max(range(len(held_out)), key=gained.__getitem__)
    table = Table(title=f"\n{len(held_out)} held-out sums, 95 % intervals")
    for column in ("stage", "sums right", held_out[example].prompt, "reward", "KL to SFT", "tokens", "seconds", "run"):
        table.add_column(column, justify="left" if column in ("stage", "run") else "right")
    for name, stage in stages.items():
        policy = policies.get(name)
        ranked = last(stage, "eval_accuracy") if name == "reward model" else None
        tokens = last(stage, "num_tokens")
        table.add_row(
            name,
            percent(accuracy_interval(policy.right)) if policy else f"{100 * ranked:.1f} % of pairs" if ranked else "",
            policy.answers[example] if policy else "",
            f"{policy.scores.mean():.2f}" if policy else "",
            f"{policy.kl.mean():.2f}" if policy and name != "untrained" else "",
            f"{tokens:,.0f}" if tokens else "",
            f"{stage.seconds:.0f}" if stage.seconds else "",
            stage.folder.name,
        )
    console.print(table)
    console.print(
        "reward: mean of what the reward model says of a sampled answer; KL: in nats per answer; tokens: through the "
        f"model in training.\nAll of it lies in {folder}: of each run its settings, metrics.jsonl and checkpoints/, "
        "whose model loads with transformers.\nNext: a real model on real data, see README.md.",
        soft_wrap=True,
    )
