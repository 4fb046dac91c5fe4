"""Log-probabilities of tokens and sequences and what else a softmax tells, with or without the matrix of logits.

The logits of a batch are its largest tensor by far: 1,024 tokens over a vocabulary of 49,152 are 200 MB in float32,
and a plain log-softmax with its backward pass holds several of them. ``linear_logprobs`` goes from hidden states
straight to log-probabilities, one tile of tokens × vocabulary at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from trueup.objectives.products import grid_padding, product_dtype
from trueup.objectives.shapes import fill_masked, require_positive, require_same_shape


class TokenStatistics(NamedTuple):
    """What a softmax over the vocabulary says at each token, in nats; None where it was not asked for.

    All are of one shape, one number a token. The fields beside ``logprobs`` are what ``want`` may name.
    """

    logprobs: Tensor
    """Log-probability of the target: ``token_logprobs``."""
    entropy: Tensor | None = None
    """``entropy``."""
    vocab_mean_logprobs: Tensor | None = None
    """Mean log-probability of all entries: ``vocab_mean_logprobs``."""
    log_collision: Tensor | None = None
    """Log-probability that two draws are the same: ``log_collision``. Carries no gradient."""


def token_logprobs(
    logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"], *, temperature: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Log-probability of each target token.

        log p(t) = z_t − log Σ_v exp(z_v),   z = logits / temperature

    Natural logarithm; bfloat16 and float16 logits are raised to float32. Raises ``ValueError`` unless temperature > 0.
    """
    require_positive("temperature", temperature)
    scaled = _scaled(logits, temperature)
    return scaled.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy(logits: Float[Tensor, "*batch vocab"], *, temperature: float = 1.0) -> Float[Tensor, "*batch"]:
    """Entropy of the next token in nats.

        H = −Σ_v p_v·log p_v,   p = softmax(logits / temperature)

    bfloat16 and float16 logits are raised to float32. Raises ``ValueError`` unless temperature > 0.
    """
    require_positive("temperature", temperature)
    logprobs = _scaled(logits, temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def vocab_mean_logprobs(logits: Float[Tensor, "*batch vocab"], *, temperature: float = 1.0) -> Float[Tensor, "*batch"]:
    """Mean log-probability of all V entries of the vocabulary: the log-likelihood of a label that is any of them.

        m = 1/V · Σ_v log p_v,   p = softmax(logits / temperature)

    In nats, at most −log V, which it is where all are as likely. What label smoothing adds to the likelihood, see
    ``label_smoothed_nll``. bfloat16 and float16 logits are raised to float32. Raises ``ValueError`` unless
    temperature > 0.
    """
    require_positive("temperature", temperature)
    scaled = _scaled(logits, temperature)
    return scaled.mean(-1) - scaled.logsumexp(-1)


def log_collision(logits: Float[Tensor, "*batch vocab"], *, temperature: float = 1.0) -> Float[Tensor, "*batch"]:
    """Log-probability that two independent draws of the next token are the same.

        c = log Σ_v p_v² = log Σ_v exp(2z_v) − 2·log Σ_v exp(z_v),   p = softmax(z),   z = logits / temperature

    In nats, from −log V (all are as likely) to 0 (one is certain); −c is the Rényi entropy of order 2. A weight and not
    a loss: no gradient flows through it. bfloat16 and float16 logits are raised to float32. Raises ``ValueError``
    unless temperature > 0.
    """
    require_positive("temperature", temperature)
    scaled = _scaled(logits.detach(), temperature)
    return (2 * scaled).logsumexp(-1) - 2 * scaled.logsumexp(-1)


def token_statistics(
    logits: Float[Tensor, "*batch vocab"],
    targets: Int[Tensor, "*batch"],
    *,
    temperature: float = 1.0,
    want: Collection[str] = (),
) -> TokenStatistics:
    """``token_logprobs``, and what of the other ``TokenStatistics`` is named in ``want``, each [...] like ``targets``.

    Raises ``ValueError`` for a name that is none of theirs, and unless temperature > 0.
    """
    _require_known(want)
    functions = {"entropy": entropy, "vocab_mean_logprobs": vocab_mean_logprobs, "log_collision": log_collision}
    wanted = {name: functions[name](logits, temperature=temperature) for name in want}
    return TokenStatistics(token_logprobs(logits, targets, temperature=temperature), **wanted)


def label_smoothed_nll(
    logprobs: Float[Tensor, "*batch"], vocab_mean_logprobs: Float[Tensor, "*batch"], *, label_smoothing: float
) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood of a label that is the target with 1 − ε, and otherwise any entry of the vocabulary.

        L_t = −(1 − ε)·log p(t) − ε·1/V·Σ_v log p_v

    Shapes: log-probs of the targets and ``vocab_mean_logprobs`` [...] → [...], in nats. The minimiser gives the target
    1 − ε + ε/V and every other entry ε/V. ``label_smoothing`` is ε; 0 is the plain negative log-likelihood.
    Raises ``ValueError`` unless 0 ≤ ε < 1, and if the shapes differ.
    Source: Szegedy et al. 2016 (arXiv 1512.00567), section 7, with the uniform distribution.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    require_same_shape(logprobs, vocab_mean_logprobs=vocab_mean_logprobs)
    return -(1 - label_smoothing) * logprobs - label_smoothing * vocab_mean_logprobs


def sequence_logprobs(
    logprobs: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch"]:
    """Log-probability of each sequence: the sum over the tokens that its mask selects.

        log π(y|x) = Σ_t m_t·log π(y_t | x, y_<t)

    What lies under False may be anything, infinities included, and gets no gradient. Nothing selected gives 0.
    """
    return fill_masked(logprobs, mask).sum(-1)


def linear_logprobs(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    want: Collection[str] = (),
    weight_grad: Float[Tensor, "vocab dim"] | None = None,
    chunk_size: int | None = None,
    vocab_chunk_size: int | None = None,
) -> TokenStatistics:
    """Log-probability of each target under a linear head, and what ``want`` names, without the matrix of logits.

        a = scale·(W·h + b)
        z = a / temperature,   with a soft cap: softcap·tanh(a / softcap) / temperature
        log p(t) = z_t − log Σ_v exp(z_v)

    and, [tokens] each, if ``want`` has their name, of ``TokenStatistics``:

        entropy              H = −Σ_v p_v·log p_v
        vocab_mean_logprobs  m = 1/V · Σ_v log p_v
        log_collision        c = log Σ_v p_v²

    The order is that of transformers: Cohere's ``logit_scale`` and the inverse of Granite's ``logits_scaling`` are the
    scale, Gemma 2's ``final_logit_softcapping`` is the cap. Results are float32 (float64 for float64 input) in nats.
    Gradients flow to ``hidden``, ``weight`` and ``bias`` from all results but ``log_collision``, once (no second
    derivative); what needs no gradient costs none, and neither does what is not wanted. ``weight_grad``: where to add
    the gradient of ``weight``, tile by tile, in place of handing it to autograd: a float32 sum (float64 for float64
    input) over many calls then costs no second matrix of that size.

    Neither pass ever holds more logits than a few tiles of ``chunk_size`` tokens × ``vocab_chunk_size`` entries. By
    default a tile suits the cache of a CPU (1,024 × 1,024, in bfloat16 2,048 × 1,024), and keeps an accelerator busy
    elsewhere (4,096 × 8,192). Kept for the backward pass are the inputs and one or two numbers a token; it computes the
    tiles anew. Half-precision inputs are multiplied in their own type (or in float32, where a CPU is faster in it);
    softmax and all sums over tiles are in float32.

    Raises ``ValueError`` for inputs of different types, a ``weight_grad`` of another shape or type than its sum has, a
    temperature, soft cap or tile that is not positive, an unknown name in ``want``, and a target outside the vocabulary
    (on an accelerator, where the check would wait for the device, its result is NaN).
    Source: softmax by blocks, Milakov & Gimelshein 2018 (arXiv 1805.02867); a loss over tiles of the vocabulary with
    the logits computed anew, Wijmans et al. 2024 (arXiv 2411.09009).
    """
    require_positive("temperature", temperature)
    _require_known(want)
    on_cpu = (2048, 1024) if product_dtype(hidden) == torch.bfloat16 else (1024, 1024)
    rows, columns = on_cpu if hidden.device.type == "cpu" else (4096, 8192)
    chunk_size = rows if chunk_size is None else chunk_size
    vocab_chunk_size = columns if vocab_chunk_size is None else vocab_chunk_size
    require_positive("chunk_size", chunk_size)
    require_positive("vocab_chunk_size", vocab_chunk_size)
    if softcap is not None:
        require_positive("softcap", softcap)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"hidden is {hidden.dtype} but {name} is {tensor.dtype}: cast one to the other's type")
    if hidden.device.type == "cpu" and bool(((targets < 0) | (targets >= len(weight))).any()):
        raise ValueError(f"a target lies outside the vocabulary of {len(weight)} entries")
    if weight_grad is not None:
        require_same_shape(weight, weight_grad=weight_grad)
        if weight_grad.dtype != _sum_dtype(hidden):
            raise ValueError(f"weight_grad is {weight_grad.dtype}, and sums of {hidden.dtype} are {_sum_dtype(hidden)}")
    head = _Head(scale, softcap, temperature, chunk_size, vocab_chunk_size)
    num_tokens, targets = len(hidden), targets.long()
    if padding := grid_padding(num_tokens, like=hidden):
        hidden, targets = F.pad(hidden, (0, 0, 0, padding)), F.pad(targets, (0, padding))
    found: Any = _LinearLogprobs.apply(hidden, weight, bias, targets, head, frozenset(want), weight_grad)
    cut: Any = (None if each is None else each[:num_tokens] for each in found)
    return TokenStatistics(*cut)


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _Head(NamedTuple):
    """What stands between the product and the softmax, and the size of a tile."""

    scale: float
    softcap: float | None
    temperature: float
    chunk_size: int
    vocab_chunk_size: int


class _Tiles:
    """The logits of a head, one tile of tokens × vocabulary at a time, in room that is used again and again.

    Both passes visit a slice of the vocabulary with all tokens, then the next slice: the slice of the weights is read
    once, and its gradient is finished before the next begins.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head) -> None:
        self.dtype = _sum_dtype(hidden)
        self.factor_dtype = product_dtype(hidden)
        self.hidden, self.weight, self.bias, self.targets, self.head = hidden, weight, bias, targets, head
        self.factors = hidden.to(self.factor_dtype)
        self.rows = _slices(len(hidden), head.chunk_size)
        self.columns = _slices(len(weight), head.vocab_chunk_size)
        self.buffers: dict[str, Tensor] = {}

    def room(self, name: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor on memory that every tile reuses under this name; the first tile is the largest."""
        size = math.prod(shape)
        if name not in self.buffers:
            self.buffers[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.hidden.device)
        return self.buffers[name][:size].view(shape)

    def weights(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias[columns].to(self.factor_dtype)
        return self.weight[columns].to(self.factor_dtype), bias

    def logits(self, rows: slice, weight: Tensor, bias: Tensor | None) -> Tensor:
        """z of one tile."""
        head, factors = self.head, self.factors[rows]
        shape = (len(factors), len(weight))
        slope = head.scale / (head.temperature if head.softcap is None else head.softcap)
        z = product = self.room("z", shape)
        if self.factor_dtype != self.dtype:
            product = self.room("product", shape, self.factor_dtype)
        if bias is None:
            product.addmm_(factors, weight.t(), beta=0, alpha=slope)
        else:
            torch.addmm(bias, factors, weight.t(), beta=slope, alpha=slope, out=product)
        if product is not z:
            z.copy_(product)
        return z if head.softcap is None else z.tanh_().mul_(head.softcap / head.temperature)

    def target(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The column of each token's target in this slice of the vocabulary, [rows, 1], and whether it is in it."""
        position = self.targets[rows] - columns.start
        inside = (position >= 0) & (position < columns.stop - columns.start)
        return position.clamp(0, columns.stop - columns.start - 1).unsqueeze(1), inside


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: _Head,
        want: frozenset[str],
        weight_grad: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        tiles = _Tiles(hidden, weight, bias, targets, head)
        new = partial(torch.empty, dtype=tiles.dtype, device=hidden.device)
        shape = (len(hidden), len(tiles.columns))
        peaks, log_totals = new(shape), new(shape)
        parts = {name: new(shape) for name in want}
        target_logits = new(len(hidden)).fill_(torch.nan)
        for block, columns in enumerate(tiles.columns):
            weights = tiles.weights(columns)
            for rows in tiles.rows:
                z = tiles.logits(rows, *weights)
                position, inside = tiles.target(rows, columns)
                target_logits[rows] = torch.where(inside, z.gather(1, position).squeeze(1), target_logits[rows])
                peak = z.amax(-1)
                z.sub_(peak.unsqueeze(1))
                if "vocab_mean_logprobs" in want:
                    parts["vocab_mean_logprobs"][rows, block] = z.sum(-1)
                exponentials = torch.exp(z, out=tiles.room("exponentials", z.shape)) if "entropy" in want else z.exp_()
                total = exponentials.sum(-1)
                peaks[rows, block], log_totals[rows, block] = peak, total.log()
                if "log_collision" in want:
                    parts["log_collision"][rows, block] = 2 * torch.linalg.vector_norm(exponentials, dim=-1).log()
                if "entropy" in want:
                    parts["entropy"][rows, block] = total.log() - exponentials.mul_(z).sum(-1) / total

        peak = peaks.amax(-1)
        shifts = peaks - peak.unsqueeze(1)
        log_masses = log_totals + shifts
        log_total = log_masses.logsumexp(-1)
        found = dict.fromkeys(TokenStatistics._fields) | {"logprobs": (target_logits - peak) - log_total}
        if "entropy" in want:
            # The chain rule of entropy: first which slice of the vocabulary, then which entry of it.
            log_shares = log_masses - log_total.unsqueeze(1)
            found["entropy"] = (log_shares.exp() * (parts["entropy"] - log_shares)).sum(-1)
        if "vocab_mean_logprobs" in want:
            sizes = shifts.new_tensor([columns.stop - columns.start for columns in tiles.columns])
            total = (parts["vocab_mean_logprobs"] + sizes * shifts).sum(-1)
            found["vocab_mean_logprobs"] = total / len(weight) - log_total
        if "log_collision" in want:
            found["log_collision"] = (parts["log_collision"] + 2 * shifts).logsumexp(-1) - 2 * log_total
            ctx.mark_non_differentiable(found["log_collision"])

        ctx.save_for_backward(hidden, weight, bias, targets, peak + log_total, found["entropy"])
        ctx.head, ctx.weight_grad = head, weight_grad
        ctx.set_materialize_grads(False)
        return tuple(found.values())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_vocab_mean: Tensor | None,
        grad_log_collision: None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_partition, total_entropy = ctx.saved_tensors
        head: _Head = ctx.head
        given_sum: Any = ctx.weight_grad
        tiles = _Tiles(hidden, weight, bias, targets, head)
        slope = head.scale / head.temperature
        pull = torch.zeros_like(log_partition) if grad_logprobs is None else grad_logprobs * slope
        spread = None if grad_entropy is None else grad_entropy * slope
        lift = None if grad_vocab_mean is None else grad_vocab_mean * slope
        drain = pull if lift is None else pull + lift

        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=tiles.dtype) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight and given_sum is None else None
        grad_bias = torch.empty_like(bias) if wants_bias else None
        for columns in tiles.columns:
            weights = tiles.weights(columns)
            weight_sum = None
            if grad_weight is not None:
                weight_sum = tiles.room("weight_sum", weights[0].shape).zero_()
            elif wants_weight:
                weight_sum = given_sum[columns]  # pyright: ignore[reportOptionalSubscript]
            bias_sum = tiles.room("bias_sum", weights[0].shape[:1]).zero_() if wants_bias else None
            for rows in tiles.rows:
                grad = tiles.logits(rows, *weights)
                if head.softcap is not None:
                    bend = torch.mul(grad, head.temperature / head.softcap, out=tiles.room("bend", grad.shape))
                    bend.square_().neg_().add_(1)
                # dL/dz = p·(−(g + m) − e·(log p + H)) + m/V, + g at the target; g, e, m: the gradients of
                # log-probability, entropy and the mean over the vocabulary.
                grad.sub_(log_partition[rows].unsqueeze(1))
                if spread is None:
                    grad.exp_().mul_(-drain[rows].unsqueeze(1))
                else:
                    probs = torch.exp(grad, out=tiles.room("probs", grad.shape))
                    grad.add_(total_entropy[rows].unsqueeze(1)).mul_(-spread[rows].unsqueeze(1))
                    grad.sub_(drain[rows].unsqueeze(1)).mul_(probs)
                if lift is not None:
                    grad.add_(lift[rows].unsqueeze(1), alpha=1 / len(weight))
                position, inside = tiles.target(rows, columns)
                grad.scatter_add_(1, position, torch.where(inside, pull[rows], 0).unsqueeze(1))
                if head.softcap is not None:
                    grad.mul_(bend)
                if bias_sum is not None:
                    bias_sum.add_(grad.sum(0))
                if tiles.factor_dtype != tiles.dtype:
                    grad = tiles.room("product", grad.shape, tiles.factor_dtype).copy_(grad)
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], grad, weights[0])
                if weight_sum is not None:
                    _add_product(weight_sum, grad.t(), tiles.factors[rows])
            if grad_weight is not None and weight_sum is not None:
                grad_weight[columns] = weight_sum
            if grad_bias is not None and bias_sum is not None:
                grad_bias[columns] = bias_sum
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left·right, summed in the type of the total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature, at least in float32, and no copy where nothing changes."""
    raised = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return raised if temperature == 1 else raised / temperature


def _require_known(want: Collection[str]) -> None:
    known = TokenStatistics._fields[1:]
    if unknown := set(want).difference(known):
        raise ValueError(f"want names {', '.join(sorted(unknown))}, but knows only {', '.join(known)}")
