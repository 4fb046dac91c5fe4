"""The peer's side: the same steps with TRL's own trainers, in TRL's environment.

Nothing of a trainer is replaced but what would tokenise: the ids are given. Everything else is an option of TRL. Of
``GRPOTrainer`` two methods are timed, and its end token is one that is never sampled, so that completions are equally
long.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
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
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)


class Stopwatch(TrainerCallback):
    """One line for each optimiser step: loss and gradient norm as the trainer logs them, and its seconds.

    A step runs from the first forward pass to the moved parameters, the trainer's metrics inside. That leaves out
    collating before and logging after it, which is to the peer's advantage: our seconds hold the making of batches.
    """

    def __init__(self, clocks: dict[str, float], device: str) -> None:
        self.clocks, self.device = clocks, device

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clocks.clear()
        protocol.wait_for(self.device)
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        protocol.wait_for(self.device)
        self.seconds = time.perf_counter() - self.began
        self.parts = self.clocks | {"learn": self.seconds - sum(self.clocks.values())} if self.clocks else {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the summary at the end of training
            return
        with contextlib.redirect_stdout(sys.__stdout__):
            protocol.emit(
                step=state.global_step - 1,
                loss=logs["loss"],
                grad_norm=logs["grad_norm"],
                seconds=self.seconds,
                parts=self.parts,
            )


class TokenisedDPOTrainer(DPOTrainer):
    """``DPOTrainer`` on ids. The two others take tokenised columns as they are; this one would look for text."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class TimedGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer``, its seconds divided: ``sample`` is generation, ``score`` what follows until a batch is ready
    (rewards, advantages, the reference's log-probs). ``steps_file``: what each step learned from is written there."""

    def __init__(self, *args: Any, steps_file: Path | None, end_token_ids: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clocks: dict[str, float] = {}
        self.steps_file = steps_file
        self.eos_token_ids = end_token_ids

    def _generate(self, prompts: list[Any]) -> Any:
        began = time.perf_counter()
        output = super()._generate(prompts)
        self.clocks["sample"] = time.perf_counter() - began
        return output

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        protocol.wait_for(self.accelerator.device.type)
        self.clocks["score"] = time.perf_counter() - began - self.clocks["sample"]
        if not output["advantages"].view(-1, self.num_generations).any(-1).all():
            raise SystemExit(protocol.NO_SIGNAL)
        if self.steps_file:
            protocol.add_step(self.steps_file, self._learned_from(output))
        return output

    def _learned_from(self, batch: dict[str, Any]) -> protocol.OnlineStep:
        size = self.num_generations
        prompts, completions = (
            [row[mask.bool()].tolist() for row, mask in zip(batch[f"{side}_ids"], batch[f"{side}_mask"], strict=True)]
            for side in ("prompt", "completion")
        )
        groups = [completions[start : start + size] for start in range(0, len(completions), size)]
        return protocol.OnlineStep(
            prompts=prompts[::size], completions=groups, scores=[protocol.score(group) for group in groups]
        )


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


def common_options(args: argparse.Namespace, folder: str, batch_size: int) -> dict[str, Any]:
    """The same recipe for all objectives, with every feature off that costs time and isn't part of the step."""
    if batch_size % args.micro_batch:
        raise SystemExit(f"--micro-batch {args.micro_batch} does not divide the {batch_size} rows of a step")
    return {
        "output_dir": folder,
        "use_cpu": args.device == "cpu",
        "bf16": args.precision == "bfloat16",
        "max_steps": args.num_steps,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": batch_size // args.micro_batch,
        "gradient_checkpointing": False,
        "learning_rate": protocol.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": protocol.BETAS[0],
        "adam_beta2": protocol.BETAS[1],
        "adam_epsilon": protocol.EPSILON,
        "weight_decay": 0.0,
        "max_grad_norm": protocol.MAX_GRAD_NORM,
        "dataloader_pin_memory": args.device != "cpu",
        "use_liger_kernel": args.liger,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def online_trainer(args: argparse.Namespace, folder: str) -> TimedGRPOTrainer:
    """GRPO as published: one ratio per token, a mean per completion, group's standard deviation, k3 not weighted."""
    case = protocol.CASES[args.case]
    never_sampled = [case.vocabulary]  # None would be replaced by the model's own end token
    model = AutoModelForCausalLM.from_pretrained(
        args.work.policy, dtype=getattr(torch, args.weights), attn_implementation=args.attention
    )
    if args.steps_file:
        # Where the reference is loaded from: another model than the policy, so that there is a KL to see.
        model.config._name_or_path = str(args.work.reference)
    return TimedGRPOTrainer(
        model=model,
        reward_funcs=protocol.score,
        args=GRPOConfig(
            num_generations=case.group_size,
            max_completion_length=case.new_tokens,
            num_iterations=1,
            beta=args.kl_coef,
            use_bias_correction_kl=False,
            loss_type="grpo",
            scale_rewards="group",
            temperature=1.0,
            generation_kwargs={"ignore_eos": True} if args.vllm else {"eos_token_id": never_sampled},
            use_vllm=args.vllm,
            vllm_mode="colocate",
            vllm_max_model_length=case.longest + case.new_tokens,
            vllm_importance_sampling_correction=False,
            cache_implementation=args.cache,
            shuffle_dataset=False,
            **common_options(args, folder, case.num_completions),
        ),
        train_dataset=Dataset.from_list([{"prompt": protocol.as_text(prompt)} for prompt in case.prompts()]),
        processing_class=AutoTokenizer.from_pretrained(args.work.policy),
        steps_file=args.steps_file,
        end_token_ids=never_sampled,
    )


def trainer(args: argparse.Namespace, folder: str) -> DPOTrainer | SFTTrainer | RewardTrainer | TimedGRPOTrainer:
    if args.objective == "grpo":
        return online_trainer(args, folder)
    options = common_options(args, folder, args.batch_size)
    options |= {"train_sampling_strategy": "sequential", "max_length": None}
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
    parser.add_argument("--cache", choices=("static",), help="GRPO only: cache_implementation; by default it grows")
    parser.add_argument(
        "--weights", choices=protocol.PRECISIONS, default="float32", help="GRPO only: bfloat16 has no float32 masters"
    )
    parser.add_argument("--vllm", action="store_true", help="GRPO on a GPU only: generates, in this process")
    parser.add_argument("--liger", action="store_true", help="on a GPU only: Liger's kernels")
    parser.add_argument("--padding-free", action="store_true", help="SFT only: one flat row and position ids")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    imported_mib = protocol.used_mib(args.device)
    # What the libraries print goes to the other stream: the output holds JSON lines and nothing else.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        peer = trainer(args, folder)
        peer.remove_callback(PrinterCallback)
        peer.add_callback(Stopwatch(getattr(peer, "clocks", {}), args.device))
        peer.train()
    protocol.emit(imported_mib=imported_mib, peak_mib=protocol.peak_mib(args.device))


if __name__ == "__main__":
    main()
