"""What the model writes to a few fixed prompts, at every evaluation: the quickest way to see a run go wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trueup.models.load import context_length
from trueup.records import StopReason
from trueup.rollout.settings import SamplingParams
from trueup.rollout.torch_engine import TorchEngine
from trueup.trainers.inputs import Inputs
from trueup.trainers.session import Session


def greedy_completions(
    engine: TorchEngine, prompts: Sequence[np.ndarray], *, stop_tokens: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """The most likely next tokens, one by one, after each prompt, up to the first stop token, which is left off.

    Where the model's context ends, so does the answer; a prompt that fills it has none. Greedy, so that no random
    stream of training is drawn from.
    """
    context = context_length(engine.model) or sys.maxsize
    short = [index for index, prompt in enumerate(prompts) if len(prompt) < context]
    sampling = SamplingParams(temperature=0, max_new_tokens=max_new_tokens, stop_tokens=tuple(stop_tokens))
    completions: list[list[int]] = [[] for _ in prompts]
    for index, group in zip(short, engine.generate([prompts[index] for index in short], sampling), strict=True):
        (completion,) = group.completions
        written = completion.tokens.tolist()
        completions[index] = written[:-1] if completion.stop_reason is StopReason.END else written
    return completions


def sample_writer(session: Session, model: Any, tokenizer: Any, inputs: Inputs) -> Callable[[int], None]:
    """A function of the step: append a greedy completion of each sampled prompt to ``samples.jsonl``, as text."""
    prompts = [group.prompt for group in inputs.sampled]
    engine: TorchEngine | None = None

    def write(step: int) -> None:
        nonlocal engine
        if engine is None:
            engine = TorchEngine(model, dtype="same")
        else:
            engine.update_weights(model)
        written = greedy_completions(
            engine, prompts, stop_tokens=inputs.stop_tokens, max_new_tokens=session.settings.sample_tokens
        )
        session.folder.log_samples(
            [
                {"prompt": tokenizer.decode(prompt.tolist()), "completion": tokenizer.decode(tokens)}
                for prompt, tokens in zip(prompts, written, strict=True)
            ],
            step,
        )

    return write if prompts else lambda step: None
