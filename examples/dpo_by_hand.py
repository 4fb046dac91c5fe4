"""DPO by hand: from the formula, with torch and transformers alone.

    L = −log σ( β·[log π(y_w|x) − log π_ref(y_w|x)] − β·[log π(y_l|x) − log π_ref(y_l|x)] )

    python examples/dpo_by_hand.py --model MODEL --data pairs.jsonl --steps 4

``pairs.jsonl`` has one ``{"prompt": "...", "chosen": "...", "rejected": "..."}`` a line, plain text. MODEL is a folder
or a hub name. Each step prints its loss, the implicit rewards of both sides, and how often the chosen one is ahead.
``dpo_with_trl.py`` does the same with TRL, and so does

    trueup preference --model MODEL --data pairs.jsonl --output runs/dpo --streaming --max-steps 4 --batch-size 4 \
        --learning-rate 1e-5 --lr-schedule constant --dtype float32
"""

import argparse
import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

Pair = tuple[list[int], list[int], list[int]]
"""Tokens of the prompt, the chosen and the rejected completion."""


def read_pairs(path: str, tokenizer: Any) -> list[Pair]:
    """Every completion ends with the end token, so that a model learns to stop."""

    def tokens(prompt: str, *texts: str) -> Iterator[list[int]]:
        start = tokenizer(prompt)["input_ids"]
        yield start
        for text in texts:
            # Behind its prompt: many tokenizers put a space in front of a text that stands alone.
            whole = tokenizer(prompt + text)["input_ids"]
            alone = tokenizer(text, add_special_tokens=False)["input_ids"]
            yield [*(whole[len(start) :] if whole[: len(start)] == start else alone), tokenizer.eos_token_id]

    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [tuple(tokens(row["prompt"], row["chosen"], row["rejected"])) for row in rows]


def sequence_logprob(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t): the logits at one place are those of the next token."""
    tokens = torch.tensor([prompt + completion], device=model.device)
    logits = model(tokens).logits[0, len(prompt) - 1 : -1].float()
    targets = tokens[0, len(prompt) :, None]
    return logits.log_softmax(-1).gather(-1, targets).sum()


def dpo_step(policy: Any, reference: Any, pair: Pair, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of one pair, and the implicit rewards β·log(π/π_ref) of its chosen and its rejected completion."""
    prompt, *sides = pair
    rewards = []
    for completion in sides:
        with torch.no_grad():
            ref_logprob = sequence_logprob(reference, prompt, completion)
        rewards.append(beta * (sequence_logprob(policy, prompt, completion) - ref_logprob))
    chosen, rejected = rewards
    return -logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def batches(pairs: list[Pair], size: int) -> Iterator[list[Pair]]:
    """In the order of the file, over and over."""
    endless = itertools.cycle(pairs)
    while True:
        yield list(itertools.islice(endless, size))


def train(args: argparse.Namespace) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # In evaluation mode: with dropout on, a policy would differ from its reference before it learned anything.
    policy: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0)
    losses = []
    for step, batch in zip(range(args.steps), batches(read_pairs(args.data, tokenizer), args.batch_size), strict=False):
        total, ahead, rewards = 0.0, 0.0, torch.zeros(2)
        for pair in batch:
            loss, chosen, rejected = dpo_step(policy, reference, pair, args.beta)
            (loss / len(batch)).backward()  # the mean over the batch, one pair at a time
            total += loss.item() / len(batch)
            rewards += torch.stack([chosen, rejected]).cpu() / len(batch)
            ahead += (chosen > rejected).item() / len(batch)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        print(f"step {step + 1}  loss {total:.6f}  rewards {rewards[0]:+.4f} {rewards[1]:+.4f}  ahead {ahead:.2f}")
    if args.output:
        policy.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    return losses


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="DPO by hand.")
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--data", required=True, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--output", help="where to save the trained model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    return parser


if __name__ == "__main__":
    train(arguments().parse_args())
