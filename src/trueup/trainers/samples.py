"""What the model writes to a few fixed prompts, at every evaluation: the quickest way to see a run go wrong."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from trueup.models.load import context_length
from trueup.trainers.inputs import Inputs
from trueup.trainers.session import Session


@torch.no_grad()
def greedy_completions(
    model: Any, prompts: Sequence[np.ndarray], *, stop_tokens: Sequence[int], max_new_tokens: int, batch_size: int = 64
) -> list[list[int]]:
    """The most likely next tokens, one by one, after each prompt, up to the first stop token, which is left off.

    Where the model's context ends, so does the answer. Prompts of one length run together, so that nothing is padded.
    Greedy, so that no random stream of training is drawn from.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    training = model.training
    model.eval()
    completions: dict[int, list[int]] = {}
    for length, indices in by_length.items():
        room = (context_length(model) or sys.maxsize) - length
        if room <= 0:
            completions |= {index: [] for index in indices}
            continue
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            tokens = torch.as_tensor(np.stack([prompts[index] for index in batch]), device=model.device)
            written = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=min(max_new_tokens, room),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=list(stop_tokens),
                pad_token_id=stop_tokens[0],
            )[:, length:]
            for index, row in zip(batch, written.tolist(), strict=True):
                completions[index] = list(takewhile(lambda token: token not in stop_tokens, row))
    model.train(training)
    return [completions[index] for index in range(len(prompts))]


def write_samples(session: Session, model: Any, tokenizer: Any, inputs: Inputs, step: int) -> None:
    """Append a greedy completion of each sampled prompt to ``samples.jsonl``, as text."""
    prompts = [group.prompt for group in inputs.sampled]
    written = greedy_completions(
        model, prompts, stop_tokens=inputs.stop_tokens, max_new_tokens=session.settings.sample_tokens
    )
    session.folder.log_samples(
        [
            {"prompt": tokenizer.decode(prompt.tolist()), "completion": tokenizer.decode(tokens)}
            for prompt, tokens in zip(prompts, written, strict=True)
        ],
        step,
    )
