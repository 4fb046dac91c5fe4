"""The run of ``dpo_by_hand.py`` with TRL: the same pairs, order, settings and losses.

    pip install trl
    python examples/dpo_with_trl.py --model MODEL --data pairs.jsonl --steps 4

By default TRL shuffles, takes 8 pairs a step and lets the learning rate fall; here it is told otherwise. Dropout is off
on both sides.
"""

import argparse
from typing import Any

import torch
from datasets import load_dataset
from dpo_by_hand import arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Losses(TrainerCallback):
    """Prints what is logged at each step, and keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            chosen, rejected = logs["rewards/chosen"], logs["rewards/rejected"]
            ahead = logs["rewards/accuracies"]
            print(
                f"step {state.global_step}  loss {logs['loss']:.6f}  rewards {chosen:+.4f} {rejected:+.4f}"
                f"  ahead {ahead:.2f}"
            )


def train(args: argparse.Namespace) -> list[float]:
    config = DPOConfig(
        output_dir=args.output or "dpo_with_trl",
        beta=args.beta,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=args.max_grad_norm,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    kept = Losses()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=config,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[kept],
    )
    trainer.train()
    if args.output:
        trainer.save_model(args.output)
    return kept.losses


if __name__ == "__main__":
    train(arguments().parse_args())
