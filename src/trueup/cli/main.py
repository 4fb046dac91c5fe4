"""``trueup``: finds the command, parses its settings, runs it.

Nothing heavy is imported before the command is known to run: help and mistakes are answered at once.
Exit codes: 0 done; 2 a mistake that the user can mend, said in one message on stderr; 130 interrupted, 143 by SIGTERM;
141 the output's reader went away; 1 anything else, with its traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from trueup.errors import TrueupError


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command lives: a module that imports neither torch nor transformers, and names in it."""

    summary: str
    module: str
    settings: str
    """The settings class."""
    run: str
    """The function that takes the settings."""
    defaults: str | None = None
    """The function that makes the preset from the flags, for a command that has one."""
    notes: str | None = None
    """The function that says more under --help."""
    first: str | None = None
    """The setting that a first word without a flag is for."""


COMMANDS = {
    "demo": Command(
        "Train a tiny model through SFT, reward model, DPO, PPO, GRPO in minutes",
        "trueup.cli.demo",
        "DemoSettings",
        "demo",
    ),
    "data check": Command(
        "Show what a data file holds: format, lengths, dropped rows, trained tokens",
        "trueup.cli.data",
        "CheckSettings",
        "check",
    ),
    "model new": Command("Write a tiny model from scratch", "trueup.cli.model", "NewSettings", "new"),
    "model normalize": Command(
        "Copy a reward model with its scores shifted to mean 0 on given completions",
        "trueup.cli.score",
        "NormalizeSettings",
        "normalize",
    ),
    "sample": Command("Sample completions from a model", "trueup.cli.sample", "SampleSettings", "sample"),
    "sft": Command("Supervised fine-tuning on demonstrations", "trueup.cli.train", "SFTSettings", "sft"),
    "reward": Command("Train a reward model on preferences", "trueup.cli.train", "RewardSettings", "reward"),
    "score": Command("Score completions with reward models", "trueup.cli.score", "ScoreSettings", "score"),
    "pairs": Command(
        "Make preference pairs or ranked lists of sampled completions and their scores",
        "trueup.cli.pairs",
        "PairsSettings",
        "pairs",
    ),
    "preference": Command(
        "Preference optimisation: DPO and its family", "trueup.cli.train", "PreferenceSettings", "preference"
    ),
    "dpo": Command(
        "preference, with the DPO paper's settings as defaults",
        "trueup.cli.train",
        "PreferenceSettings",
        "preference",
        defaults="dpo_defaults",
    ),
    "rl": Command(
        "Online reinforcement learning against rewards, by a recipe",
        "trueup.cli.train",
        "PolicySettings",
        "rl",
        defaults="rl_defaults",
        notes="rl_notes",
    ),
    **{
        name: Command(
            f"rl --recipe {name}",
            "trueup.cli.train",
            "PolicySettings",
            "rl",
            defaults=f"{name}_defaults",
            notes="rl_notes",
        )
        for name in ("reinforce", "rloo", "ppo", "grpo")
    },
    "iterate": Command(
        "rl and reward in turn: the reward model is retrained on the policy's answers",
        "trueup.cli.iterate",
        "IterateSettings",
        "iterate",
        defaults="iterate_defaults",
    ),
    "mdp solve": Command(
        "Values and the best policy of a known tabular process", "trueup.cli.mdp_solve", "SolveSettings", "solve"
    ),
    "mdp estimate": Command(
        "Values of a policy from sampled experience, beside the exact ones",
        "trueup.cli.mdp_estimate",
        "EstimateSettings",
        "estimate",
    ),
    "mdp learn": Command(
        "Learn to act from sampled experience, beside the best policy", "trueup.cli.mdp_learn", "LearnSettings", "learn"
    ),
    "control train": Command(
        "Train an agent in a Gymnasium environment: PPO, A2C, REINFORCE, DQN",
        "trueup.cli.control",
        "ControlSettings",
        "train",
        defaults="train_defaults",
        first="env",
    ),
    "control eval": Command(
        "Play episodes with a trained agent", "trueup.cli.control", "EvalSettings", "evaluate", first="run"
    ),
    "control watch": Command(
        "Make a video of a trained agent", "trueup.cli.control", "WatchSettings", "watch", first="run"
    ),
    "cache": Command("List what is kept between runs, or remove it", "trueup.cli.cache", "CacheSettings", "cache"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. ``SystemExit`` comes from ``--help`` (0) and parse errors (2)."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except TrueupError as error:
        print(f"trueup: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"trueup: {str(error) or 'interrupted'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. What Python still flushes at its end must not meet the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if (shortage := _shortage(error)) is None:
            raise
        print(f"trueup: {shortage}", file=sys.stderr)
        return 2


def _shortage(error: Exception) -> str | None:
    """What to say where memory or the disk ran out in the middle of something that doesn't look out for it."""
    from trueup.runs.files import is_disk_full
    from trueup.runs.memory import is_out_of_memory

    if is_out_of_memory(error):
        return "out of memory\n  → take a smaller model, or --dtype bfloat16"
    if is_disk_full(error):
        return f"no room left on the disk: {error}\n  → free some space"
    return None


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        import trueup

        print(f"trueup {trueup.__version__}")
        return 0
    if argv[:1] in (["-h"], ["--help"]):
        print(_usage(COMMANDS))
        return 0
    for num_words in (2, 1):
        name = " ".join(argv[:num_words])
        if name in COMMANDS:
            _run(name, argv[num_words:])
            return 0
    group = {name: command for name, command in COMMANDS.items() if argv and name.startswith(f"{argv[0]} ")}
    if group and argv[1:] in (["-h"], ["--help"]):
        print(_usage(group))
        return 0
    print(_complaint(argv, group), file=sys.stderr)
    return 2


def _run(name: str, argv: list[str]) -> None:
    command = COMMANDS[name]
    module = import_module(command.module)
    from trueup.runs.settings import flag_name, parse

    if command.first and argv and not argv[0].startswith("-"):
        argv = [flag_name(command.first), *argv]

    default = getattr(module, command.defaults)(argv) if command.defaults else None
    summary = f"{command.summary}.{getattr(module, command.notes)() if command.notes else ''}"
    settings = parse(getattr(module, command.settings), argv, f"trueup {name}", summary, default)
    from trueup.cli.memory import keep_freed_memory

    keep_freed_memory()
    getattr(module, command.run)(settings)


def _usage(commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    listed = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in commands.items())
    return f"""usage: trueup COMMAND [settings]

Train language models from preferences and rewards.

commands:
{listed}

`trueup COMMAND --help` explains every setting. Settings can stand in a file: `trueup COMMAND --config FILE.yaml`.
`trueup --version` says which version this is."""


def _complaint(argv: list[str], group: dict[str, Command]) -> str:
    """What to say when no command matches; ``group`` holds the commands that start with the word given."""
    if not argv:
        return _usage(COMMANDS)
    if group:
        what = f"there is no command '{' '.join(argv[:2])}'" if argv[1:] else f"'{argv[0]}' needs a second word"
        return f"trueup: {what}\n  → {', '.join(f'trueup {name}' for name in group)}"
    close = difflib.get_close_matches(argv[0], sorted({*COMMANDS, *(name.split()[0] for name in COMMANDS)}))
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"trueup: there is no command '{argv[0]}'\n  → {meant}`trueup --help` lists the commands"
