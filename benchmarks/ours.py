"""Our side: the same steps with ``trueup``'s own loops, on the pairs that are given as ids."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import protocol
import torch

from trueup.cli.memory import keep_freed_memory
from trueup.records import Completion, CompletionGroup
from trueup.runs.folder import RunFolder, read_metrics
from trueup.trainers.preference import train_preference
from trueup.trainers.reward import train_reward
from trueup.trainers.settings import PreferenceSettings, RewardSettings, SFTSettings
from trueup.trainers.sft import train_sft


def groups(objective: str, pairs: list[protocol.Pair]) -> list[CompletionGroup]:
    """The pairs as groups: chosen and rejected, for SFT the chosen alone."""

    def group(pair: protocol.Pair) -> CompletionGroup:
        sides = (pair.chosen,) if objective == "sft" else (pair.chosen, pair.rejected)
        return CompletionGroup(
            prompt=np.asarray(pair.prompt, dtype=np.int64),
            completions=tuple(Completion(tokens=np.asarray(side, dtype=np.int64)) for side in sides),
        )

    return [group(pair) for pair in pairs]


def common_settings(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """The same recipe for all three. Streaming takes the pairs in the order of the file, as the peer does."""
    settings = {
        "output": str(output),
        "streaming": True,
        "max_steps": args.num_steps,
        "batch_size": args.batch_size,
        "dtype": args.precision,
        "device": "cpu",
        "optimizer": "adamw",
        "learning_rate": protocol.LEARNING_RATE,
        "lr_schedule": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": protocol.MAX_GRAD_NORM,
        "num_samples": 0,
        "quiet": True,
    }
    return settings | ({} if args.tokens_per_batch is None else {"tokens_per_batch": args.tokens_per_batch})


def train(args: argparse.Namespace, output: Path) -> None:
    common = common_settings(args, output)
    data = groups(args.objective, protocol.read_pairs(args.work)[: args.num_steps * args.batch_size])
    if args.objective == "dpo":
        reference = str(args.work.reference)
        settings = PreferenceSettings(
            model=str(args.work.policy), reference=reference, beta=protocol.DPO_BETA, **common
        )
        train_preference(settings, data=data)
    elif args.objective == "sft":
        train_sft(SFTSettings(model=str(args.work.policy), **common), data=data)
    else:
        train_reward(RewardSettings(model=str(args.work.reward_model), **common), data=data)


def main() -> None:
    parser = protocol.side_parser("trueup's side of the step benchmark.")
    parser.add_argument("--tokens-per-batch", type=int, help="by default that of the settings")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        imported_mib = protocol.resident_mib()
        with contextlib.redirect_stdout(sys.stderr):
            train(args, output)
        for line in read_metrics(RunFolder(output).metrics):
            protocol.emit(
                step=line["step"] - 1,
                loss=line["loss"],
                grad_norm=line["grad_norm"],
                seconds=line["step_seconds"],
            )
    protocol.emit(imported_mib=imported_mib, peak_mib=protocol.peak_mib())


if __name__ == "__main__":
    main()
