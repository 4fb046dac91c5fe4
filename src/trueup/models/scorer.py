"""What gets trained: a model that takes a ``TreeBatch`` and gives log-probs, or scores.

A ``Scorer`` goes backbone → hidden states at the scored positions → head, so that [tokens, vocabulary] never exists. All of
it happens inside one ``forward``: that is what gradient synchronisation, sharding and compilation wrap.

The tree needs a model in which tokens meet in attention only, in attention that goes through transformers' seam, and that
hands the ``layout`` keyword down. Where one of these does not hold nothing fails: the numbers are wrong. So ``prepare_scorer``
compares every model once with its own plain forward pass, and scores it on padded rows if they differ.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trueup.errors import ModelError
from trueup.models.tree import TREE_ATTENTION, TreeBatch, no_mask, register_tree_attention, tree_batch
from trueup.objectives.logprobs import entropy, linear_logprobs, token_logprobs
from trueup.records import Completion, CompletionGroup

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far a log-prob x may be from the plain forward pass, in units of 1 + |x|."""

SMALL = 500_000_000
"""Half-precision models up to this many parameters are checked in a float32 copy, where rounding hides nothing."""

CHECK_WINDOW = 4
"""Sliding windows are shrunk to this during the check, so that a dozen tokens are enough to see them."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Per scored token, float32 [S], in nats: log-prob of the target, and the entropy of the distribution if asked for."""

    logprobs: Tensor
    entropy: Tensor | None = None


def plain_model(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper, adapters in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]


class Scorer(nn.Module):
    """Log-probs of completions under a causal language model.

    ``model``: the transformers model, or a peft model around one. ``path``: "tree" or "padded". Use ``prepare_scorer``.
    """

    def __init__(self, model: nn.Module, path: str = "tree", *, own_head: bool = False) -> None:
        super().__init__()
        self.model = model
        self.path = path
        self.own_head = own_head

    def forward(self, batch: TreeBatch, *, temperature: float = 1.0, with_entropy: bool = False) -> Scores:
        """Score every completion token of the batch: [S].

        ``temperature``: that of the sampling, > 0. Raises ``ValueError`` for any other.
        """
        if self.own_head:
            logits = _own_logits(self.model, batch)
            return Scores(
                token_logprobs(logits, batch.targets, temperature=temperature),
                entropy(logits, temperature=temperature) if with_entropy else None,
            )
        model = plain_model(self.model)
        hidden = _hidden_states(model, batch, self.path, "scored")
        transform = _head_transform(model) | {"temperature": temperature, "with_entropy": with_entropy}
        head = _in_use(model.get_output_embeddings())
        if isinstance(head, nn.Linear):
            return Scores(
                *linear_logprobs(hidden.to(head.weight.dtype), head.weight, batch.targets, bias=head.bias, **transform)
            )
        return Scores(*_module_logprobs(head, hidden, batch.targets, **transform))


class RewardScorer(nn.Module):
    """One score per completion from a sequence-classification model with one label: its trunk, then its ``score`` head at each
    completion's last token."""

    def __init__(self, model: nn.Module, path: str = "tree") -> None:
        super().__init__()
        self.model = model
        self.path = path

    def forward(self, batch: TreeBatch) -> Tensor:
        """Score every completion of the batch: float32 [C]."""
        model = plain_model(self.model)
        return model.score(_hidden_states(model, batch, self.path, "last")).squeeze(-1).float()


def _hidden_states(model: Any, batch: TreeBatch, path: str, where: str) -> Tensor:
    """The backbone's last hidden states at ``batch.scored`` [S, D] or at ``batch.last`` [C, D].

    ``index_select`` has a backward pass that adds row by row in order, so the gradient of a state that is read several times
    (a prompt's last) is the same to the bit in every run; that of ``hidden[index]`` is not.
    """
    if path == "tree":
        out = model.base_model(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            attention_mask=no_mask(batch.tokens.device),
            layout=batch.layout,
            use_cache=False,
        )
        return out.last_hidden_state[0].index_select(0, getattr(batch, where))
    rows = batch.padded()
    out = model.base_model(input_ids=rows.tokens, attention_mask=rows.attention_mask, use_cache=False)
    return out.last_hidden_state.flatten(0, 1).index_select(0, getattr(rows, where))


def _own_logits(model: nn.Module, batch: TreeBatch) -> Tensor:
    """[S, V] from the model's own forward pass on padded rows, for a head that does more than is known here."""
    rows = batch.padded()
    logits = model(input_ids=rows.tokens, attention_mask=rows.attention_mask, use_cache=False).logits
    return logits.flatten(0, 1).index_select(0, rows.scored)


def _head_transform(model: Any) -> dict[str, float | None]:
    """What models do to the logits behind the head: Cohere's factor, Granite's divisor, Falcon-H1's factor, Gemma's soft-cap."""
    scale = 1.0
    if getattr(model, "logit_scale", None) is not None:
        scale *= model.logit_scale
    if getattr(model.config, "logits_scaling", None) is not None:
        scale /= model.config.logits_scaling
    if getattr(model.config, "lm_head_multiplier", None) is not None:
        scale *= model.config.lm_head_multiplier
    return {"scale": scale, "softcap": getattr(model.config, "final_logit_softcapping", None)}


def _in_use(head: nn.Module) -> nn.Module:
    """The copy of a head that peft trains in full (``modules_to_save``), or the head itself."""
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    active = [name for name in head.active_adapters if name in copies]  # pyright: ignore
    return copies[active[0]] if active and not head.disable_adapters else head.original_module  # pyright: ignore


def _module_logprobs(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
    with_entropy: bool,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor | None]:
    """``linear_logprobs`` for a head that is not a plain linear layer, such as one with LoRA: any module, chunk by chunk, the
    logits of a chunk computed anew in the backward pass."""

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logprobs = token_logprobs(logits, targets, temperature=temperature)
        return logprobs, entropy(logits, temperature=temperature) if with_entropy else None

    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    logprobs, entropies = zip(*(checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks), strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


# --- the check at load


def prepare_scorer(model: nn.Module) -> Scorer:
    """A ``Scorer`` for a causal language model, on the tree where the model's own forward pass proves it right, else on padded
    rows, with one warning.

    Raises ``ModelError`` if neither reproduces the model's plain forward pass.
    """

    def truth(model: nn.Module, batch: TreeBatch) -> Tensor:
        rows = batch.padded()
        logprobs = []
        for tokens, real in zip(rows.tokens, rows.attention_mask, strict=True):
            sequence = tokens[: int(real.sum())]
            logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
            logprobs.append(token_logprobs(logits, sequence[1:]))
        scored = [own[-n:] for own, n in zip(logprobs, batch.lengths.tolist(), strict=True)]
        return torch.cat(scored)

    candidates = [
        Scorer(model, "tree"),
        Scorer(model, "padded"),
        Scorer(model, "padded", own_head=True),
    ]
    return _first_exact(candidates, truth, lambda scorer, batch: scorer(batch).logprobs)


def prepare_reward_scorer(model: nn.Module) -> RewardScorer:
    """A ``RewardScorer`` for a sequence-classification model, checked as ``prepare_scorer`` does.

    Raises ``ModelError`` unless the model has a ``score`` head with one label, or if neither path reproduces it.
    """
    inner = plain_model(model)
    if not hasattr(inner, "score") or inner.config.num_labels != 1:
        raise ModelError(
            f"{type(inner).__name__} has no 'score' head with one label",
            way_out="load it as AutoModelForSequenceClassification with num_labels=1",
        )

    def truth(model: nn.Module, batch: TreeBatch) -> Tensor:
        rows = batch.padded()
        sequences = (tokens[: int(real.sum())] for tokens, real in zip(rows.tokens, rows.attention_mask, strict=True))
        return torch.cat([model(input_ids=sequence[None], use_cache=False).logits[0] for sequence in sequences]).float()

    return _first_exact(
        [RewardScorer(model, "tree"), RewardScorer(model, "padded")], truth, lambda scorer, batch: scorer(batch)
    )


def _first_exact(
    candidates: list[Any], truth: Callable[[nn.Module, TreeBatch], Tensor], score: Callable[[Any, TreeBatch], Tensor]
) -> Any:
    """The first candidate that gives the truth, its attention set on the model. Candidates share the model and differ in path."""
    given = plain_model(candidates[0].model)
    if getattr(given, "active_peft_config", None) is not None and given.active_peft_config.is_prompt_learning:
        raise ModelError("prompt-learning adapters are not supported", way_out="use LoRA")
    dtype = given.dtype
    if dtype != torch.float32 and sum(p.numel() for p in given.parameters()) <= SMALL:
        trial, dtype = copy.deepcopy(candidates[0].model).float(), torch.float32
    else:
        trial = candidates[0].model
    inner = plain_model(trial)
    own_attention = inner.config._attn_implementation
    register_tree_attention()

    batch = check_batch(inner, next(trial.parameters()).device)
    failures = []
    with torch.no_grad(), _evaluating(trial), _shrunken_windows(inner):
        with _attention(inner, "eager"):
            expected = truth(trial, batch).to(torch.float32)
        for candidate in candidates:
            attention = TREE_ATTENTION if candidate.path == "tree" else own_attention
            tried = copy.copy(candidate)
            tried._modules = {**candidate._modules, "model": trial}
            with _attention(inner, attention):
                failure = _difference(lambda tried=tried: score(tried, batch), expected, TOLERANCE[dtype])
            if failure is None:
                break
            failures.append(failure)
        else:
            raise ModelError(
                f"neither the tree batch nor padded rows reproduce the plain forward pass of {type(inner).__name__} ({failures[-1]})",
                way_out="this architecture can't be trained here",
            )
    if candidate.path == "padded":
        warnings.warn(
            f"{type(given).__name__} is scored on padded rows: the same results as the tree batch, but the prompt is computed once"
            f" per completion ({failures[0]})",
            stacklevel=3,
        )
    given.config._attn_implementation = attention
    return candidate


def _difference(score: Callable[[], Tensor], expected: Tensor, tolerance: float) -> str | None:
    """Why the scores are not the expected ones, or None if they are. A model that chokes on the batch counts as different."""
    try:
        found = score().to(torch.float32)
    except Exception as error:
        return f"the tree batch raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    error = float(((found - expected).abs() / (1 + expected.abs())).max())
    return None if error <= tolerance else f"scores differ by {error:.1e} of 1 + |score|, tolerance {tolerance:.0e}"


def check_batch(model: Any, device: torch.device) -> TreeBatch:
    """Two groups of mixed lengths, all longer than ``CHECK_WINDOW``, of random tokens other than the pad token."""
    rng = np.random.default_rng(0)
    vocab = model.get_input_embeddings().num_embeddings
    pad = model.config.get_text_config().pad_token_id
    usable = np.setdiff1d(np.arange(min(vocab, 1000)), [-1 if pad is None else pad])

    def draw(length: int) -> np.ndarray:
        return rng.choice(usable, length)

    groups = [
        CompletionGroup(prompt=draw(prompt), completions=tuple(Completion(tokens=draw(n)) for n in lengths))
        for prompt, lengths in ((6, (5, 3)), (3, (7, 2)))
    ]
    return tree_batch(groups, device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
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
def _shrunken_windows(model: Any) -> Iterator[None]:
    """Sliding windows and attention chunks cut to ``CHECK_WINDOW`` wherever config and layers keep them: a window of 4,096 would
    take thousands of tokens to show."""
    places = [place for place in (model.config, model.config.get_text_config(), *model.modules())]
    found = [
        (place, name, getattr(place, name))
        for place in places
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(place.__dict__.get(name), int)
    ]
    for place, name, _ in found:
        setattr(place, name, CHECK_WINDOW)
    try:
        yield
    finally:
        for place, name, value in found:
            setattr(place, name, value)
