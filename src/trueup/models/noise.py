"""Noise on what a model reads, for training only: NEFTune."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trueup.models.tree import TreeBatch


def embedding_noise(batch: TreeBatch, dim: int, alpha: float) -> Tensor:
    """Uniform noise for the input embeddings of the stream, drawn from torch's generator of the device: float32 [T, D].

        n_t = α / √(L_t·D) · u_t,   u_t ~ Uniform(−1, 1)^D

    ``dim`` is D, the width of an embedding; L_t the number of tokens in the sequence of token t, prompt and completion
    (``TreeBatch.sequence_lengths``: of a prompt that several completions share, the longest). The expected norm of a
    sequence's noise is then about α/√3, whatever its length.
    Source: Jain et al. 2023 (arXiv 2310.05914), algorithm 1.
    """
    uniform = torch.empty(len(batch.tokens), dim, device=batch.tokens.device).uniform_(-1, 1)
    return uniform * alpha * (batch.sequence_lengths * dim).float().rsqrt().unsqueeze(1)


@contextmanager
def noisy_embeddings(model: nn.Module, batch: TreeBatch, path: str, alpha: float) -> Iterator[None]:
    """Inside the block, what ``model``'s input embedding gives for ``batch`` has ``embedding_noise`` added.

    ``path``: "tree" or "padded", how the batch is fed; both read the same noise. Without ``alpha`` nothing is drawn.
    The embedding is hooked for the time of the block only, so that evaluation, sampling and a saved model know nothing
    of it; under gradient checkpointing it is read once, in the forward pass.
    """
    if not alpha:
        yield
        return

    def add(embedding: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor:
        noise = embedding_noise(batch, embeddings.shape[-1], alpha).to(embeddings.dtype)
        if path == "padded":
            return embeddings + noise[batch.padded().stream]
        return embeddings + nn.functional.pad(noise, (0, 0, 0, embeddings.shape[1] - len(noise)))

    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
