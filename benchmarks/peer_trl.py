"""The peer's side: the same steps with TRL's own trainers, in TRL's environment.

Nothing of a trainer is replaced but what would tokenise: the ids are given. Everything else is an option of TRL.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from typing import Any

# Before anything imports them: no progress bars on the output, no calls to a hub, no telemetry.
os.environ.update(
    TQDM_DISABLE="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
)

import protocol
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


class Stopwatch(TrainerCallback):
    """One line for each optimiser step: loss and gradient norm as the trainer logs them, and its seconds.

    A step runs from the first forward pass to the moved parameters, the trainer's metrics inside. That leaves out
    collating before and logging after it, which is to the peer's advantage: our seconds hold the making of batches.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the summary at the end of training
            return
        with contextlib.redirect_stdout(sys.__stdout__):
            protocol.emit(
                step=state.global_step - 1, loss=logs["loss"], grad_norm=logs["grad_norm"], seconds=self.seconds
            )


class TokenisedDPOTrainer(DPOTrainer):
    """``DPOTrainer`` on ids. The two others take tokenised columns as they are; this one would look for text."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def rows(objective: str, pairs: list[protocol.Pair]) -> Dataset:
    """The pairs in the columns that each trainer takes for tokenised data."""
    if objective == "dpo":
        return Dataset.from_list(
            [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in pairs]
        )
    if objective == "sft":
        return Dataset.from_list(
            [
                {"input_ids": pair.prompt + pair.chosen, "labels": [-100] * len(pair.prompt) + pair.chosen}
                for pair in pairs
            ]
        )
    return Dataset.from_list(
        [{"chosen_ids": pair.prompt + pair.chosen, "rejected_ids": pair.prompt + pair.rejected} for pair in pairs]
    )


def common_options(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The same recipe for all three, with every feature off that costs time and isn't part of the step."""
    if args.batch_size % args.micro_batch:
        raise SystemExit(f"--micro-batch {args.micro_batch} does not divide --batch-size {args.batch_size}")
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": args.precision == "bfloat16",
        "max_steps": args.num_steps,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.batch_size // args.micro_batch,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "max_length": None,
        "learning_rate": protocol.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": protocol.BETAS[0],
        "adam_beta2": protocol.BETAS[1],
        "adam_epsilon": protocol.EPSILON,
        "weight_decay": 0.0,
        "max_grad_norm": protocol.MAX_GRAD_NORM,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trainer(args: argparse.Namespace, folder: str) -> DPOTrainer | SFTTrainer | RewardTrainer:
    options = common_options(args, folder)
    data = rows(args.objective, protocol.read_pairs(args.work)[: args.num_steps * args.batch_size])
    tokenizer = AutoTokenizer.from_pretrained(args.work.policy)
    load = {"dtype": torch.float32, "attn_implementation": args.attention}  # bfloat16 is autocast: float32 masters
    if args.objective == "dpo":
        return TokenisedDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.work.policy, **load),
            ref_model=AutoModelForCausalLM.from_pretrained(args.work.reference, **load),
            args=DPOConfig(beta=protocol.DPO_BETA, **options),
            train_dataset=data,
            processing_class=tokenizer,
        )
    if args.objective == "sft":
        return SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.work.policy, **load),
            args=SFTConfig(padding_free=args.padding_free, **options),
            train_dataset=data,
            processing_class=tokenizer,
        )
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(args.work.reward_model, num_labels=1, **load),
        args=RewardConfig(**options),
        train_dataset=data,
        processing_class=tokenizer,
    )


def main() -> None:
    parser = protocol.side_parser("TRL's side of the step benchmark.")
    parser.add_argument("--micro-batch", type=int, required=True, help="per_device_train_batch_size")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--padding-free", action="store_true", help="SFT only: one flat row and position ids")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    imported_mib = protocol.resident_mib()
    # What the libraries print goes to the other stream: the output holds JSON lines and nothing else.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        peer = trainer(args, folder)
        peer.remove_callback(PrinterCallback)
        peer.add_callback(Stopwatch())
        peer.train()
    protocol.emit(imported_mib=imported_mib, peak_mib=protocol.peak_mib())


if __name__ == "__main__":
    main()
