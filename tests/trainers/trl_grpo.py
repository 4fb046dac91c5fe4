"""Writes ``trl_grpo.json``: what TRL 1.16's own GRPO trainer logs of fixed completions. Run it with TRL's Python.

    .venv-trl/bin/python tests/trainers/trl_grpo.py    (`make bench` makes that environment)

The tiny Llama of ``trl_runs.py``; what is sampled is a formula too, handed to TRL as its ``rollout_func``, and so is
the reward. Two rollouts, each learned from twice with steps so large that ratios are clipped; and once, where TRL has
no other reference than the start, with a KL to it. ``test_trl_grpo.py`` holds our loop against the numbers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from trl_runs import END, PADDING, tiny_llama, tokens

NUM_ROLLOUTS, NUM_PROMPTS, GROUP_SIZE, LONGEST = 2, 3, 4, 6
LEARNING_RATE = 3e-3
METRICS = (
    *("loss", "grad_norm", "kl", "reward", "reward_std", "frac_reward_zero_std"),
    *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    *("completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"),
    *(f"completions/{name}_terminated_length" for name in ("mean", "min", "max")),
)
"""What both of us log, as far as a run has it."""

RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.1},
    "grpo, dual clip": {"loss_type": "grpo", "delta": 1.5},
    "grpo, truncated completions masked": {"loss_type": "grpo", "mask_truncated_completions": True},
    "grpo, weighted k3": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
    "grpo, entropy bonus": {"loss_type": "bnpo", "entropy_coef": 0.05},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo", "beta": 0.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
}


def prompts() -> list[list[int]]:
    """Of all rollouts, in their order."""
    return [tokens(row, 2 + row % 3) for row in range(NUM_ROLLOUTS * NUM_PROMPTS)]


def completions(row: int) -> list[list[int]]:
    """The answers to prompt ``row``: of 1 to 6 tokens, the last the end token but for some of 6."""
    found = []
    for k in range(GROUP_SIZE):
        length = 1 + (2 * row + 5 * k) % LONGEST
        whole = length < LONGEST or row % 4 == 0
        found.append([*tokens(7 * row + 3 * k, length - whole), *[END] * whole])
    return found


def reward(completion: list[int]) -> float:
    return sum(completion) % 5 / 2


def rewards(row: int) -> list[float]:
    """Of prompt 4 all answers are worth the same."""
    return [0.5 if row == 4 else reward(each) for each in completions(row)]


def main() -> None:
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    names = ["<pad>", "<unk>", "<end>", *"0123456789+="]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.BPE({name: index for index, name in enumerate(names)}, [], unk_token="<unk>")
        ),
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
    )
    assert tokenizer.pad_token_id == PADDING
    rows = ["".join(names[token] for token in prompt) for prompt in prompts()]

    def rollout(prompts: list[str], *_: Any) -> dict[str, Any]:
        """TRL asks for every prompt as often as it wants answers."""
        said = []
        for k, prompt in enumerate(prompts):
            row = rows.index(prompt)
            said.append((row, completions(row)[k % GROUP_SIZE]))
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [each for _, each in said],
            "logprobs": None,
            "worth": [rewards(row)[k % GROUP_SIZE] for k, (row, _) in enumerate(said)],
        }

    def score(worth: list[float], **_: Any) -> list[float]:
        return worth

    def run(settings: dict[str, Any]) -> list[dict[str, float]]:
        with tempfile.TemporaryDirectory() as folder:
            # TRL makes the reference from where the model lies.
            tiny_llama().save_pretrained(f"{folder}/model")
            made = GRPOTrainer(
                model=f"{folder}/model",
                reward_funcs=score,
                rollout_func=rollout,
                args=GRPOConfig(
                    output_dir=folder,
                    model_init_kwargs={"dtype": "float32"},
                    max_steps=2 * NUM_ROLLOUTS,
                    per_device_train_batch_size=NUM_PROMPTS * GROUP_SIZE,
                    gradient_accumulation_steps=1,
                    num_generations=GROUP_SIZE,
                    num_iterations=2,
                    max_completion_length=LONGEST,
                    learning_rate=LEARNING_RATE,
                    lr_scheduler_type="constant",
                    optim="adamw_torch",
                    shuffle_dataset=False,
                    bf16=False,
                    gradient_checkpointing=False,
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                    **({"beta": 0.0, "use_bias_correction_kl": False} | settings),
                ),
                train_dataset=Dataset.from_list([{"prompt": row} for row in rows]),
                processing_class=tokenizer,
            )
            made.train()
        lines = [line for line in made.state.log_history if "loss" in line]
        return [{name: line[name] for name in METRICS if name in line} for line in lines]

    runs = {name: run(settings) for name, settings in RUNS.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(steps)}" for name, steps in runs.items())
    written = f'{{\n"trl": {json.dumps(trl.__version__)},\n{lines}\n}}\n'
    Path(__file__).with_suffix(".json").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
