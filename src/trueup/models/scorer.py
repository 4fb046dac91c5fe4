"""What gets trained: a model that takes a ``TreeBatch`` and gives log-probs, or scores.

A ``Scorer`` goes backbone → hidden states at the scored positions → head, so that [tokens, vocabulary] never exists.
All of it happens inside one ``forward``: that is what gradient synchronisation, sharding and compilation wrap.

The tree needs a model whose tokens meet in attention only, in attention that goes through transformers' seam, and that
hands the keyword ``layout`` down. Where one of these does not hold, nothing fails: the numbers are wrong. So
``prepare_scorer`` compares every model once with its own plain forward pass, and takes padded rows if they differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trueup.errors import ModelError
from trueup.models.adapters import plain_model
from trueup.models.attention import no_mask
from trueup.models.check import check_batch, evaluating, first_exact, plain_logprobs, plain_scores
from trueup.models.noise import noisy_embeddings
from trueup.models.norms import swap_norms
from trueup.models.precision import gradient_sum
from trueup.models.residual import float32_residual
from trueup.models.tree import TreeBatch
from trueup.objectives.logprobs import TokenStatistics, linear_logprobs, token_statistics
from trueup.objectives.products import grid_padding

AnyScorer = TypeVar("AnyScorer", "Scorer", "RewardScorer")


class Scorer(nn.Module):
    """Log-probs of completions under a causal language model. Made by ``prepare_scorer``.

    ``model``: the transformers model, or a peft model around one. ``path``: "tree" or "padded". ``own_head``: on padded
    rows, take the logits from the model's own forward pass, [tokens, vocabulary] and all. ``neftune_alpha``: in
    training mode, the scale of noise on the input embeddings (``embedding_noise``). ``float32_residual``, a field, is
    set by ``prepare_scorer`` for half-precision models.
    """

    def __init__(
        self, model: nn.Module, path: str = "tree", *, own_head: bool = False, neftune_alpha: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self.path = path
        self.own_head = own_head
        self.neftune_alpha = neftune_alpha
        self.float32_residual = False

    def forward(self, batch: TreeBatch, *, temperature: float = 1.0, want: Collection[str] = ()) -> TokenStatistics:
        """Score every completion token of the batch: float32 [S], in the order of ``batch.targets``.

        ``temperature``: that of the sampling. ``want``: what to give beside the log-probs, by the names of
        ``TokenStatistics``. Raises ``ValueError`` for an unknown name, and unless the temperature is > 0.
        """
        model = plain_model(self.model)
        noise = self.neftune_alpha if self.training else 0.0
        with noisy_embeddings(model, batch, self.path, noise), _residual(self):
            if self.own_head:
                logits = _own_logits(self.model, batch)
                return token_statistics(logits, batch.targets, temperature=temperature, want=want)
            hidden = _hidden_states(model, batch, self.path, "scored")
        scale, softcap = head_transform(model)
        head = _in_use(model.get_output_embeddings())
        score = _linear_scores if isinstance(head, nn.Linear) else _module_scores
        return score(head, hidden, batch.targets, scale=scale, softcap=softcap, temperature=temperature, want=want)


class RewardScorer(nn.Module):
    """Scores of a sequence-classification model with one label. Made by ``prepare_reward_scorer``.

    Its trunk, then its ``score`` head; there is no language-model head. ``where`` it is read: "last", at each
    completion's last token, "step_ends", at the last token of each step, or "states", wherever a critic has to say what
    is still to come.
    """

    def __init__(self, model: nn.Module, path: str = "tree", *, where: str = "last") -> None:
        super().__init__()
        self.model = model
        self.path = path
        self.where = where
        self.float32_residual = False

    def forward(self, batch: TreeBatch) -> Tensor:
        """Score every completion of the batch, float32 [C], every step, [M], or every state, [S + C]: in the order of
        the batch's indices."""
        model = plain_model(self.model)
        with _residual(self):
            hidden = _hidden_states(model, batch, self.path, self.where)
        return model.score(hidden).squeeze(-1).float()


def vocabulary_layers(scorer: nn.Module) -> list[nn.Embedding | nn.Linear]:
    """The layers whose weights have a row for every entry of the vocabulary: the input embedding, and of a ``Scorer``
    the head. ``MasterWeights`` adds up their gradients in place. Only plain layers: a scaled embedding, or one with an
    adapter, does more with its weights, and its gradient stays autograd's."""
    if not isinstance(scorer, Scorer | RewardScorer):
        return []
    model = plain_model(scorer.model)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings() if isinstance(scorer, Scorer) and not scorer.own_head else None
    found: list[Any] = [each for each in (embedding, head) if type(each) in (nn.Embedding, nn.Linear)]
    return found


def _residual(scorer: AnyScorer) -> AbstractContextManager[None]:
    """What a scorer's backbone runs under."""
    model = plain_model(scorer.model)
    dtype = model.get_input_embeddings().weight.dtype
    return float32_residual(model, dtype) if scorer.float32_residual else nullcontext()


def _hidden_states(model: Any, batch: TreeBatch, path: str, where: str) -> Tensor:
    """The backbone's last hidden states at the batch's "scored" [S, D], "last" [C, D], "step_ends" [M, D] or
    "states" [S + C, D], in the weights' type.

    The backward pass of ``index_select`` adds row by row in order: the gradient of a state that is read several times
    (a prompt's last) is the same to the bit in every run on a CPU. That of ``hidden[index]`` is not.
    """
    weight = model.get_input_embeddings().weight
    if path == "tree":
        # Tokens that no other sees, where they make products come in fewer sizes.
        padding = grid_padding(len(batch.tokens), like=weight)
        states = model.base_model(
            input_ids=nn.functional.pad(batch.tokens, (0, padding))[None],
            position_ids=nn.functional.pad(batch.positions, (0, padding))[None],
            attention_mask=no_mask(batch.tokens.device),
            layout=batch.layout,
            use_cache=False,
        ).last_hidden_state
        return states[0].index_select(0, getattr(batch, where)).to(weight.dtype)
    rows = batch.padded()
    states = model.base_model(input_ids=rows.tokens, attention_mask=rows.attention_mask, use_cache=False)
    return states.last_hidden_state.flatten(0, 1).index_select(0, getattr(rows, where)).to(weight.dtype)


def _own_logits(model: nn.Module, batch: TreeBatch) -> Tensor:
    """[S, V] from the model's own forward pass on padded rows, for a head that does more than is known here."""
    rows = batch.padded()
    logits = model(input_ids=rows.tokens, attention_mask=rows.attention_mask, use_cache=False).logits
    return logits.flatten(0, 1).index_select(0, rows.scored)


def head_transform(model: Any) -> tuple[float, float | None]:
    """What the model does to the logits behind its head: a factor, and a soft-cap.

    Cohere multiplies by ``logit_scale``, Falcon-H1 by ``lm_head_multiplier``, Granite divides by ``logits_scaling``,
    Gemma caps at ``final_logit_softcapping``. An architecture that uses one of these names otherwise fails the check.
    """
    given = {
        name: getattr(model.config, name, None) for name in ("logit_scale", "lm_head_multiplier", "logits_scaling")
    }
    known = {name: value for name, value in given.items() if value is not None}
    scale = known.get("logit_scale", 1.0) * known.get("lm_head_multiplier", 1.0) / known.get("logits_scaling", 1.0)
    return scale, getattr(model.config, "final_logit_softcapping", None)


def _in_use(head: nn.Module) -> nn.Module:
    """The copy of a head that peft trains in full (``modules_to_save``), or the head itself."""
    copies: Any = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    wrapper: Any = head
    active = [name for name in wrapper.active_adapters if name in copies]
    return wrapper.original_module if wrapper.disable_adapters or not active else copies[active[0]]


def _linear_scores(head: Any, hidden: Tensor, targets: Tensor, **options: Any) -> TokenStatistics:
    options |= {"bias": head.bias, "weight_grad": gradient_sum(head)}
    return linear_logprobs(hidden.to(head.weight.dtype), head.weight, targets, **options)


def _module_scores(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    scale: float,
    softcap: float | None,
    chunk_size: int = 128,
    **options: Any,
) -> TokenStatistics:
    """For a head that is not a plain linear layer, such as one with LoRA: any module, called as it is.

    It works chunk by chunk, the logits of a chunk computed anew in the backward pass, so that they never all exist.
    """

    def score(hidden: Tensor, targets: Tensor) -> TokenStatistics:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return token_statistics(logits, targets, **options)

    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    scored: list[Any] = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
    joined: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in zip(*scored, strict=True)]
    return TokenStatistics(*joined)


# --- the way that is exact


def prepare_scorer(model: nn.Module, *, neftune_alpha: float = 0.0) -> Scorer:
    """A ``Scorer`` for a causal language model: on the tree where the model's own forward pass proves it right, else on
    padded rows, with one warning and the same results.

    Sets the model's attention to the tree's, which is transformers' ``sdpa`` for every other use of the model.
    ``neftune_alpha``: noise in training, see ``Scorer``. Raises ``ModelError`` if neither reproduces the model's plain
    forward pass.
    """
    candidates = [Scorer, partial(Scorer, path="padded"), partial(Scorer, path="padded", own_head=True)]
    scorer = _prepare(model, candidates, plain_logprobs, lambda scorer, batch: scorer(batch).logprobs)
    scorer.neftune_alpha = neftune_alpha  # only now: what is random can't be compared
    return scorer


def prepare_reward_scorer(model: nn.Module) -> RewardScorer:
    """A ``RewardScorer`` for a sequence-classification model, checked as ``prepare_scorer`` does.

    It scores steps where the model's config says so (``scores_each``, see ``load_reward_model``), else completions.
    Raises ``ModelError`` unless the model has a ``score`` head with one label, or if no path reproduces it.
    """
    inner = plain_model(model)
    if not hasattr(inner, "score") or inner.config.num_labels != 1:
        raise ModelError(
            f"{type(inner).__name__} has no 'score' head with one label",
            way_out="load it as AutoModelForSequenceClassification with num_labels=1",
        )
    where = "step_ends" if getattr(inner.config, "scores_each", None) == "step" else "last"
    candidates = [partial(RewardScorer, path=path, where=where) for path in ("tree", "padded")]
    return _prepare(model, candidates, partial(plain_scores, where=where), lambda scorer, batch: scorer(batch))


def _prepare(
    model: nn.Module,
    candidates: Sequence[Callable[[nn.Module], AnyScorer]],
    truth: Callable[[nn.Module, TreeBatch], Tensor],
    score: Callable[[AnyScorer, TreeBatch], Tensor],
) -> AnyScorer:
    """The first candidate, tree before padded, that gives the truth; its attention is set on the model."""
    candidate, attention, differences = first_exact(model, candidates, truth, score)
    given = plain_model(model)
    if differences:
        warnings.warn(
            f"{type(given).__name__} can't use the tree batch ({differences[0]}): it is scored on padded rows, with "
            "the same results, but every prompt is computed once per completion",
            stacklevel=3,
        )
    given.config._attn_implementation = attention
    swap_norms(given)
    scorer = candidate(model)
    scorer.float32_residual = _takes_float32_residual(scorer, check_batch(given))
    return scorer


@torch.no_grad()
def _takes_float32_residual(scorer: Scorer | RewardScorer, batch: TreeBatch) -> bool:
    """Whether a half-precision model runs with a residual stream in float32: an operation of its own that wants both
    arguments in one type would not. Where it doesn't, the model computes as it is."""
    if plain_model(scorer.model).get_input_embeddings().weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    scorer.float32_residual = True
    try:
        with evaluating(scorer):
            scorer(batch)
    except RuntimeError:
        return False
    return True
