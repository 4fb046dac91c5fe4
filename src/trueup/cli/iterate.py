"""``trueup iterate``: policy and reward model in turn, each from where it was left.

Algorithm 1 of DeepSeekMath (Shao et al. 2024, arXiv 2402.03300):

    for iteration = 1 … I:
        π_ref ← π
        improve π against the reward model r, on a leash to π_ref           (a run of its own)
        answers of the new π, compared by those who label
        train r further on these, and on a tenth of earlier comparisons     (a run of its own)

Each part is a command that can be run by itself, in a folder of its own, and is gone on with where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trueup import recipes
from trueup.cli.train import rl_defaults
from trueup.errors import SettingsError
from trueup.runs.settings import check_range
from trueup.trainers.policy_settings import PolicySettings


@dataclass(frozen=True, kw_only=True)
class IterateSettings(PolicySettings):
    """Iterative reinforcement learning: what --reward names is retrained between the runs of the recipe."""

    output: str = "runs/iterate"
    """Folder of all of it: iteration-1, iteration-2 … with policy, samples, pairs and reward model."""
    iterations: int = 2
    """Runs of the recipe. The reward model is retrained between them, and the policy becomes its own reference."""
    labels: tuple[str, ...] = ()
    """Who compares the policy's answers: rewards, as for --reward; a verifier, a stronger judge, or a function that
    asks people."""
    label_prompts: int = 1000
    """Prompts whose answers are compared after each run."""
    label_completions: int = 4
    """Answers to each; the best and the worst make a pair."""
    replay: float = 0.1
    """Share of earlier comparisons in what the reward model is trained on further."""
    reward_steps: int = 100
    """Optimiser steps of the reward model after each run."""
    reward_batch_size: int = 64
    """Pairs in each of them."""
    reward_learning_rate: float = 1e-5
    """Peak learning rate of the reward model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "label_prompts", "reward_steps", "reward_batch_size"):
            check_range(self, name, at_least=1)
        check_range(self, "label_completions", at_least=2)
        check_range(self, "replay", at_least=0, below=1)
        check_range(self, "reward_learning_rate", above=0)


def iterate_defaults(argv: Sequence[str]) -> IterateSettings:
    """What the recipe sets."""
    values: dict[str, Any] = vars(rl_defaults(argv)) | {"output": IterateSettings.output}
    return IterateSettings(**values)


def iterate(settings: IterateSettings) -> None:
    """Run all iterations. Raises ``TrueupError`` for what can be mended."""
    from trueup.trainers.policy import train_policy

    if len(settings.reward) != 1 or not settings.labels:
        raise SettingsError(
            "one reward model is retrained, on what others compare",
            where="--labels" if settings.reward else "--reward",
            way_out="--reward MODEL --labels REWARD",
        )
    algorithm = recipes.recipe_named(settings.recipe).algorithm()
    policy, judge = settings.model, settings.reward[0]
    earlier: list[Path] = []
    for number in range(1, settings.iterations + 1):
        folder = Path(settings.output) / f"iteration-{number}"
        changes = {"model": policy, "reward": (judge,), "output": str(folder / "policy"), "resume": resumed(settings)}
        policy = str(train_policy(of_class(PolicySettings, settings, changes), algorithm).model_folder)
        if number < settings.iterations:
            pairs = compared(settings, policy, folder)
            mixed = with_replay(pairs, earlier, folder / "training.jsonl", settings.replay)
            judge = retrained(settings, judge, mixed, folder / "reward")
            earlier.append(pairs)
    print(f"policy {policy}, reward model {judge}")


def compared(settings: IterateSettings, policy: str, folder: Path) -> Path:
    """Answers of the policy, and who labels them says which is best and which is worst: a file of pairs."""
    from trueup.cli.pairs import PairsSettings, pairs
    from trueup.cli.sample import SampleSettings, sample

    samples, file = folder / "samples.jsonl", folder / "pairs.jsonl"
    if file.exists():
        return file
    sample(
        of_class(
            SampleSettings,
            settings,
            {
                "model": policy,
                "output": str(samples),
                "num_completions": settings.label_completions,
                "limit": settings.label_prompts,
                "shuffle": True,
                "resume": "auto",
            },
        )
    )
    chosen = {"data": (str(samples),), "output": str(file), "reward": settings.labels, "reward_weights": ()}
    pairs(of_class(PairsSettings, settings, chosen | {"limit": None}))
    return file


def with_replay(pairs: Path, earlier: Sequence[Path], file: Path, replay: float) -> Path:
    """The new pairs, and of earlier ones as many as make their share ``replay``, spread evenly over them."""
    from trueup.runs.files import write_atomic

    new = pairs.read_text(encoding="utf-8").splitlines()
    old = [line for path in earlier for line in path.read_text(encoding="utf-8").splitlines()]
    count = min(len(old), round(len(new) * replay / (1 - replay)))
    chosen = [old[index * len(old) // count] for index in range(count)]
    write_atomic(file, "".join(f"{json.dumps(json.loads(line))}\n" for line in new + chosen).encode())
    return file


def retrained(settings: IterateSettings, judge: str, data: Path, output: Path) -> str:
    """The reward model, trained further."""
    from trueup.trainers.reward import train_reward
    from trueup.trainers.settings import RewardSettings

    changes = {
        "model": judge,
        "data": (str(data),),
        "eval_data": (),
        "holdout": 0.0,
        "limit": None,
        "output": str(output),
        "max_steps": settings.reward_steps,
        "num_epochs": 1_000_000,
        "batch_size": settings.reward_batch_size,
        "learning_rate": settings.reward_learning_rate,
        "lora_rank": 0,
        "lora_alpha": None,
        "lora_dropout": 0.0,
        "num_samples": RewardSettings.num_samples,
        "resume": resumed(settings),
    }
    return str(train_reward(of_class(RewardSettings, settings, changes)).model_folder)


def resumed(settings: IterateSettings) -> str:
    """Of a part: where all goes on, a part that was not begun yet is begun."""
    return "no" if settings.resume == "no" else "auto"


def of_class(kind: type, settings: Any, changes: dict[str, Any]) -> Any:
    """Settings of another class: the fields that it shares, changed."""
    shared = {field.name: getattr(settings, field.name) for field in fields(kind) if hasattr(settings, field.name)}
    return kind(**(shared | changes))
