"""The check at load: which way of running a model gives what its own plain forward pass gives.

Where the tree batch does not fit a model, nothing fails: the numbers are wrong. So every model is compared once, on a
few random tokens, before it is trained or sampled from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from trueup.errors import ModelError, TrueupError
from trueup.models.adapters import plain_model
from trueup.models.attention import TREE_ATTENTION, register_tree_attention
from trueup.models.tree import TreeBatch, tree_batch
from trueup.objectives.logprobs import token_logprobs
from trueup.records import Completion, CompletionGroup

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far a score x may be from that of the plain forward pass, in units of 1 + |x|, by the type of the computation."""

SMALL = 500_000_000
"""Models of up to this many parameters are checked as a float32 copy with noise on its weights, others as they are."""

CHECK_LIMITS = {
    "sliding_window": 4,
    "attention_chunk_size": 4,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 1.0,
}
"""What windows and caps are lowered to during the check, so that a dozen tokens and small scores reach them."""

AnyCandidate = TypeVar("AnyCandidate", bound="HasPath")


class HasPath(Protocol):
    path: str


def first_exact(
    model: nn.Module,
    candidates: Sequence[Callable[[nn.Module], AnyCandidate]],
    truth: Callable[[nn.Module, TreeBatch], Tensor],
    score: Callable[[AnyCandidate, TreeBatch], Tensor],
) -> tuple[Callable[[nn.Module], AnyCandidate], str, list[str]]:
    """The first candidate that gives the truth on ``check_batch``, the attention implementation that it needs, and how
    those before it differ.

    A candidate is made from a model and says which ``path`` it takes; "tree" needs the tree's attention. The model is
    what it was afterwards. Raises ``ModelError`` if no candidate gives the truth.
    """
    given = plain_model(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError("a prompt-learning adapter has tokens that the batch does not know", way_out="use LoRA")
    register_tree_attention()
    own_attention = given.config._attn_implementation
    trial = _trial(model)
    tolerance = TOLERANCE.get(plain_model(trial).dtype, TOLERANCE[torch.float32])
    batch = check_batch(given)
    differences = []
    with torch.no_grad(), evaluating(trial), _lowered_limits(plain_model(trial)):
        with _attention(plain_model(trial), "eager"):
            expected = truth(trial, batch).float()
        for candidate in candidates:
            made = candidate(trial)
            attention = TREE_ATTENTION if made.path == "tree" else own_attention
            with _attention(plain_model(trial), attention):
                difference = _difference(partial(score, made, batch), expected, tolerance)
            if difference is None:
                return candidate, attention, differences
            differences.append(difference)
    raise ModelError(
        f"no way to run {type(given).__name__} reproduces its plain forward pass ({differences[-1]})",
        way_out="take a model of another architecture",
    )


def _trial(model: nn.Module) -> nn.Module:
    """What is checked: a float32 copy of a small model with noise on its weights; a large or quantized model itself.

    Fresh weights are small, some are 0, and what they multiply would be missing from the comparison: the scores of an
    untrained model can be off by less than rounding. Whether they are off at all does not depend on the weights.
    """
    if sum(p.numel() for p in model.parameters()) > SMALL or getattr(plain_model(model), "is_quantized", False):
        return model
    trial = copy.deepcopy(model).float()
    with torch.no_grad():
        for parameter in trial.parameters():
            noise = torch.randn(
                parameter.shape, device=parameter.device, generator=torch.Generator(parameter.device).manual_seed(0)
            )
            parameter.add_(noise, alpha=max(parameter.shape) ** -0.5 if parameter.ndim > 1 else 0.1)
    return trial


def _difference(score: Callable[[], Tensor], expected: Tensor, tolerance: float) -> str | None:
    """In which way the scores are not the expected ones; None if they are. A model that chokes on the batch differs."""
    try:
        found = score().float()
    except TrueupError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    worst = float(((found - expected).abs() / (1 + expected.abs())).max())
    return (
        None if worst <= tolerance else f"its scores are off by {worst:.1e}, more than {tolerance:.0e} of 1 + |score|"
    )


def check_batch(model: Any) -> TreeBatch:
    """Two groups of mixed lengths, all longer than the lowered window, of random tokens other than the pad token.

    Every completion is of two steps, the first of one token.
    """
    rng = np.random.default_rng(0)
    num_tokens = min(model.get_input_embeddings().num_embeddings, 1000)
    usable = np.setdiff1d(np.arange(num_tokens), [model.config.get_text_config().pad_token_id or 0])

    def draw(length: int) -> np.ndarray:
        return rng.choice(usable, length)

    groups = [
        CompletionGroup(
            prompt=draw(prompt),
            completions=tuple(Completion(tokens=draw(n), step_ends=np.array([0, n - 1])) for n in lengths),
        )
        for prompt, lengths in ((6, (5, 3)), (3, (7, 2)))
    ]
    return tree_batch(groups, model.device)


# --- the truth


def _plain_sequences(batch: TreeBatch, where: str = "last") -> Iterator[Tensor]:
    """What stands before each place, alone: int64 [1, L]. Before its last token, the completion behind its prompt."""
    rows = batch.padded()
    for place in getattr(rows, where).tolist():
        row, column = divmod(place, rows.tokens.shape[1])
        yield rows.tokens[row : row + 1, : column + 1]


def plain_logprobs(model: nn.Module, batch: TreeBatch) -> Tensor:
    """The truth for a ``Scorer``: [S]."""
    logprobs = []
    for sequence, length in zip(_plain_sequences(batch), batch.lengths.tolist(), strict=True):
        logits = model(input_ids=sequence, use_cache=False).logits[0, -length - 1 : -1]
        logprobs.append(token_logprobs(logits, sequence[0, -length:]))
    return torch.cat(logprobs)


def plain_scores(model: nn.Module, batch: TreeBatch, where: str) -> Tensor:
    """The truth for a ``RewardScorer``, [C] or [M]: transformers reads the score at the end of what it is given."""
    sequences = _plain_sequences(batch, where)
    return torch.cat([model(input_ids=sequence, use_cache=False).logits[0] for sequence in sequences])


# --- for the time of the check


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and every module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _attention(model: Any, implementation: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def _lowered_limits(model: Any) -> Iterator[None]:
    """``CHECK_LIMITS`` in place of what the config and the layers say, wherever they say anything."""
    places = {id(place): place for place in (model.config, model.config.get_text_config(), *model.modules())}
    found = [
        (place, name, vars(place)[name])
        for place in places.values()
        for name in CHECK_LIMITS
        if vars(place).get(name) is not None
    ]
    for place, name, _ in found:
        setattr(place, name, CHECK_LIMITS[name])
    try:
        yield
    finally:
        for place, name, value in found:
            setattr(place, name, value)
