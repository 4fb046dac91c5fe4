"""Fill the folder that both sides read: the models, drawn once from seeds, and the pairs as token ids."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import protocol
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trueup.data.chat import TokenizeSettings, load_groups
from trueup.data.collate import epoch_order
from trueup.models.load import load_model, model_source
from trueup.records import CompletionGroup

MAX_LENGTH = 1024
SEED = 0
PADDING = "<|endoftext|>"


def shared_data() -> Path:
    """Where the real data lie: ``$TRUEUP_SHARED_DATA``, or beside the repository."""
    root = Path(__file__).resolve().parents[1]
    return Path(os.environ.get("TRUEUP_SHARED_DATA", root.parent / "shared" / "data"))


def load_bench_tokenizer(folder: Path) -> Any:
    """The tokenizer, padding apart from its end token.

    Where they are one, transformers' reward models score the token before the end token, and ``trueup`` would choose
    another padding itself: the two sides would not score the same thing.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = PADDING
    return tokenizer


def case_tokenizer(case: protocol.Case) -> PreTrainedTokenizerFast:
    """One word for each token, so that text and ids are the same thing on every side."""
    words = models.WordLevel({protocol.word(token): token for token in range(case.vocabulary)}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=protocol.word(case.padding_token),
        eos_token=protocol.word(case.end_token),
    )


def model_config(tokenizer: Any, size: str) -> LlamaConfig:
    """A Llama of one of the sizes, its embeddings tied."""
    config = LlamaConfig(
        **protocol.SIZES[size]._asdict(),
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1  # of the reward model
    return config


def write_models(work: protocol.Work, tokenizer: Any, size: str, *, online: bool = False) -> None:
    config = model_config(tokenizer, size)
    if online:
        # The padding token is sampled like any other. As the model's it would be a row of zeros that transformers does
        # not train and trueup does; and the norm of a layer multiplies the gradient of zeros by 1,000.
        config.pad_token_id = None
    language_models = [(work.policy, LlamaForCausalLM, SEED), (work.reference, LlamaForCausalLM, SEED + 1)]
    reward_models = [] if online else [(work.reward_model, LlamaForSequenceClassification, SEED)]
    for folder, architecture, seed in language_models + reward_models:
        torch.manual_seed(seed)
        architecture(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_pretrained(work: protocol.Work, tokenizer: Any, name: str) -> None:
    """The same from a pretrained model: the reference is the model with 1 % of noise on its weights, the reward model
    has a fresh head."""
    policy = load_model(name, dtype="float32").model
    reward_model = AutoModelForSequenceClassification.from_pretrained(model_source(name), num_labels=1)
    # Not the end token: transformers would leave its embedding untrained, and trueup does not.
    policy.config.pad_token_id = reward_model.config.pad_token_id = tokenizer.pad_token_id
    policy.save_pretrained(work.policy)
    reward_model.save_pretrained(work.reward_model)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01 * float(parameter.std()))
    policy.save_pretrained(work.reference)
    for folder in (work.policy, work.reference, work.reward_model):
        tokenizer.save_pretrained(folder)


def with_prompts_of(groups: Sequence[CompletionGroup], length: int) -> list[CompletionGroup]:
    """The groups whose prompts have that many tokens or more, cut to their end."""
    return [
        dataclasses.replace(group, prompt=group.prompt[-length:]) for group in groups if len(group.prompt) >= length
    ]


def draw(groups: Sequence[CompletionGroup], num_steps: int, batch_size: int) -> list[CompletionGroup]:
    """Groups for ``num_steps`` steps, drawn at random; inside a step sorted by length.

    Sorting is for the peer: it then pads micro-batches of like lengths. It changes no loss, since a step is the mean
    over its rows, and nothing for ``trueup``, which sorts by itself and pads no rows.
    """
    needed = num_steps * batch_size
    if len(groups) < needed:
        raise SystemExit(f"the data hold {len(groups)} pairs, and {num_steps} steps of {batch_size} need {needed}")
    drawn = [groups[index] for index in epoch_order(len(groups), SEED, 0)[:needed]]
    steps = [drawn[start : start + batch_size] for start in range(0, needed, batch_size)]
    return [group for step in steps for group in sorted(step, key=padded_length)]


def padded_length(group: CompletionGroup) -> int:
    """Tokens of the longer of the group's rows (prompt and completion)."""
    return len(group.prompt) + max(len(completion.tokens) for completion in group.completions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=lambda text: protocol.Work(folder=Path(text)), required=True)
    parser.add_argument("--cases", nargs="+", choices=tuple(protocol.CASES), help="their models, and no pairs")
    parser.add_argument("--model-size", choices=tuple(protocol.SIZES), required=True, help="of the random models")
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--data", type=Path, default=shared_data() / "hh-rlhf" / "helpful-base.test.jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, default=shared_data() / "smollm2-tokenizer")
    parser.add_argument("--model", help="a pretrained model, in place of the random one")
    parser.add_argument("--prompt-tokens", type=int, help="only pairs with longer prompts, cut to this length")
    args = parser.parse_args()
    if args.cases:
        for name in args.cases:
            tokenizer = case_tokenizer(protocol.CASES[name])
            write_models(args.work.of_case(name), tokenizer, args.model_size, online=True)
        protocol.emit(cases=args.cases)
        return
    for path in (args.data, args.tokenizer):
        if not path.exists():
            raise SystemExit(f"{path} is not there: set TRUEUP_SHARED_DATA, or name --data and --tokenizer")
    tokenizer = load_bench_tokenizer(args.tokenizer)
    settings = TokenizeSettings(max_length=MAX_LENGTH, overlong_completion="drop")
    groups, _ = load_groups(args.data, tokenizer, task="preference", settings=settings)
    if args.prompt_tokens:
        groups = with_prompts_of(groups, args.prompt_tokens)
    pairs = [
        protocol.Pair(
            prompt=group.prompt.tolist(),
            chosen=group.completions[0].tokens.tolist(),
            rejected=group.completions[1].tokens.tolist(),
        )
        for group in draw(groups, args.num_steps, args.batch_size)
    ]
    protocol.write_pairs(args.work, pairs)
    if args.model:
        write_pretrained(args.work, tokenizer, args.model)
    else:
        write_models(args.work, tokenizer, args.model_size)
    protocol.emit(
        num_pairs=len(pairs),
        mean_prompt=sum(len(pair.prompt) for pair in pairs) / len(pairs),
        mean_chosen=sum(len(pair.chosen) for pair in pairs) / len(pairs),
        mean_rejected=sum(len(pair.rejected) for pair in pairs) / len(pairs),
    )


if __name__ == "__main__":
    main()
