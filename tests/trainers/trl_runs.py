"""Writes ``trl_runs.json``: losses and gradient norms of TRL 1.16's own trainers. Run it with TRL's Python.

    .venv-trl/bin/python tests/trainers/trl_runs.py    (`make bench` makes that environment)

A tiny Llama whose weights are a formula, tokens that are a formula, and a few optimiser steps, each of several
micro-batches. ``test_trl_runs.py`` takes model and tokens from here and holds our loops against the numbers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

NUM_STEPS, BATCH_SIZE, MICRO_BATCH_SIZE = 4, 6, 2
LEARNING_RATE = 1e-2
NUM_TOKENS = 15
PADDING, END = 0, 2
CENTERING = 0.05
LABEL_SMOOTHING = 0.1


def tiny_llama(kind: Any = LlamaForCausalLM) -> Any:
    """Float32, two layers; of ``LlamaForSequenceClassification`` with one label, a reward model."""
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=PADDING,
        bos_token_id=None,
        eos_token_id=END,
        num_labels=1,
    )
    model = kind(config).float()
    with torch.no_grad():
        for place, (_, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(1.7 * torch.arange(parameter.numel(), dtype=torch.float64) ** 1.3 + place)
            wave = (1 + 0.1 * wave) if parameter.ndim == 1 else 0.4 * wave
            parameter.copy_(wave.view_as(parameter))
    return model


def tokens(start: int, length: int) -> list[int]:
    """Characters (3 to 14), no control tokens."""
    return [3 + (5 * start + 7 * place + place * place) % (NUM_TOKENS - 3) for place in range(length)]


def demonstrations() -> list[tuple[list[int], list[int]]]:
    """Prompts of 1 to 6 tokens, completions of 2 to 9 with the end token."""
    return [
        (tokens(row, 1 + row * 5 % 6), [*tokens(row + 31, 1 + row * 3 % 8), END])
        for row in range(NUM_STEPS * BATCH_SIZE)
    ]


def comparisons() -> list[tuple[list[int], list[int], list[int], float]]:
    """A prompt, its better and its worse completion, and a margin."""
    return [
        (prompt, chosen, [*tokens(row + 77, 1 + row * 5 % 7), END], row % 3 * 0.5)
        for row, (prompt, chosen) in enumerate(demonstrations())
    ]


def main() -> None:
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    names = ["<pad>", "<unk>", "<end>", *"0123456789+="]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.BPE({name: index for index, name in enumerate(names)}, [], unk_token="<unk>")
        ),
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
    )

    def run(
        trainer: Any, config: Any, models: dict[str, Any], rows: list[dict[str, Any]], **settings: Any
    ) -> list[list[float]]:
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(
                **models,
                args=config(
                    output_dir=folder,
                    max_steps=NUM_STEPS,
                    per_device_train_batch_size=MICRO_BATCH_SIZE,
                    gradient_accumulation_steps=BATCH_SIZE // MICRO_BATCH_SIZE,
                    learning_rate=LEARNING_RATE,
                    lr_scheduler_type="constant",
                    optim="adamw_torch",
                    train_sampling_strategy="sequential",
                    max_length=None,
                    bf16=False,
                    gradient_checkpointing=False,
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                    **settings,
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
            made.train()
        return [[line["loss"], line["grad_norm"]] for line in made.state.log_history if "loss" in line]

    demonstrated = [
        {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}
        for prompt, completion in demonstrations()
    ]
    compared = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "margin": margin}
        for prompt, chosen, rejected, margin in comparisons()
    ]

    def text(tokens: list[int]) -> str:
        return "".join(names[token] for token in tokens)

    # What is tokenised already is no input of this trainer. It puts the end token behind the completions.
    pairs = [
        {"prompt": text(prompt), "chosen": text(chosen[:-1]), "rejected": text(rejected[:-1])}
        for prompt, chosen, rejected, _ in comparisons()
    ]
    plain = [{name: row[name] for name in ("chosen_ids", "rejected_ids")} for row in compared]

    def sft(**settings: Any) -> list[list[float]]:
        return run(SFTTrainer, SFTConfig, {"model": tiny_llama()}, demonstrated, **settings)

    def reward(rows: list[dict[str, Any]], **settings: Any) -> list[list[float]]:
        models = {"model": tiny_llama(LlamaForSequenceClassification)}
        return run(RewardTrainer, RewardConfig, models, rows, **settings)

    runs = {
        "sft": sft(completion_only_loss=True),
        "sft, all tokens": sft(completion_only_loss=False),
        "sft, label smoothing": sft(completion_only_loss=True, label_smoothing_factor=LABEL_SMOOTHING),
        "reward": reward(plain),
        "reward, margin": reward(compared),
        "reward, margin, centred": reward(compared, center_rewards_coefficient=CENTERING),
        "dpo": run(DPOTrainer, DPOConfig, {"model": tiny_llama(), "ref_model": tiny_llama()}, pairs, beta=0.1),
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(steps)}" for name, steps in runs.items())
    written = f'{{\n"trl": {json.dumps(trl.__version__)},\n{lines}\n}}\n'
    Path(__file__).with_suffix(".json").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
