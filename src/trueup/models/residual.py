"""The residual stream of a half-precision model, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def float32_residual(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, a ``model`` with weights of a half-precision ``dtype`` adds its layers up in float32.

        x_0 = embedding,   x_{l+1} = x_l + f_l(norm(x_l))

    In bfloat16 every sum is rounded to 8 bits of x, however small f_l(…) is beside it, and its gradient likewise. Here
    what the embeddings give is raised to float32, and PyTorch's promotion of types keeps the sums there; autocast
    lowers what goes into a product to ``dtype``. It is what autocast does to a model in float32, but weights are what
    they are to be already. Gradient checkpointing recomputes under the same autocast.

    The hooks are there for the time of the block only: generation, a plain forward pass and a saved model know nothing
    of it. Source: Micikevicius et al. 2018 (arXiv 1710.03740), section 3.3, of sums in float32 over half-precision
    products.
    """

    def raised(embedding: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor:
        return embeddings.float()

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                # Before the embedding's other hooks, so that what they add, and the gradient they get, is float32.
                stack.callback(module.register_forward_hook(raised, prepend=True).remove)
        stack.enter_context(torch.autocast(next(model.parameters()).device.type, dtype, cache_enabled=False))
        yield
