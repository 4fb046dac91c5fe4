"""bfloat16 compute with float32 master weights, and where gradients are added up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trueup.errors import CheckpointError


class MasterWeights:
    """Float32 copies of low-precision parameters, for the optimiser to work on.

    bfloat16 has 8 significant bits: an update below 1/512 of a weight rounds to nothing (depending on the weight, one
    up to 1/256), and at the learning rates of fine-tuning most updates are smaller. So the model computes in bfloat16
    and the optimiser keeps what rounding would lose (Micikevicius et al. 2018, arXiv 1710.03740, section 3.1):

        master ← master − update(master.grad)         in float32
        parameter ← round(master)                     in bfloat16

    As soon as a backward pass has finished a parameter's gradient, it is added to the master's float32 gradient and the
    low-precision one is freed: accumulating over micro-batches rounds each micro-batch's gradient once, never the sum.

    Use: ``optimizer = AdamW(masters.parameters)``; after the backward passes, clip ``masters.parameters``, step, then
    ``copy_back()``; ``clear_gradients()`` forgets what has accumulated. Parameters that already have 32 bits or more
    are handed through as they are, so a float32 model runs exactly as without this class.

    A master starts from what ``round_parameters`` kept, else from the parameter itself.
    ``parameters``: what is trained; frozen parameters and repetitions are left out. ``vocabulary``: layers whose
    weights have a row for every entry of the vocabulary, often most of a model. What computes their gradient adds it to
    the master's right away (``gradient_sum``), a few rows or a tile at a time. Through autograd, each use of the
    weights in each micro-batch would make a whole matrix, mostly zeros, for the next to add up.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        vocabulary: Iterable[torch.nn.Embedding | torch.nn.Linear] = (),
    ) -> None:
        trained = list({id(p): p for p in parameters if p.requires_grad}.values())
        self.parameters: list[torch.nn.Parameter] = []
        """What the optimiser works on: masters, and parameters that need none, in the order given."""
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        """(low-precision parameter, its master)."""
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.sums: dict[int, Tensor] = {}
        """Gradients that stay allocated from step to step, by the id of the parameter that they are of."""
        self.vocabulary: list[torch.nn.Embedding | torch.nn.Linear] = []
        for parameter in trained:
            if parameter.dtype.itemsize >= 4:
                self.parameters.append(parameter)
                continue
            master = torch.nn.Parameter(_unrounded(parameter))
            self.parameters.append(master)
            self.pairs.append((parameter, master))
            self.hooks.append(parameter.register_post_accumulate_grad_hook(hand_over_to(master)))
        summed = {id(parameter): parameter for parameter in self.parameters}
        summed |= {id(parameter): master for parameter, master in self.pairs}
        for layer in vocabulary:
            if (owner := summed.get(id(layer.weight))) is None:
                continue
            owner.grad = self.sums.setdefault(id(owner), torch.zeros_like(owner))
            setattr(layer, _GRADIENT_SUM, owner.grad)
            self.vocabulary.append(layer)
            if isinstance(layer, torch.nn.Embedding):
                self.hooks.append(layer.register_forward_hook(embed_with_sum))

    def clear_gradients(self) -> None:
        """Start the next sum from nothing."""
        for parameter in self.parameters:
            if id(parameter) in self.sums:
                self.sums[id(parameter)].zero_()
            else:
                parameter.grad = None

    @torch.no_grad()
    def copy_back(self) -> None:
        """Round the masters into the parameters that compute. Call it after every optimiser step."""
        if self.pairs:
            working, masters = zip(*self.pairs, strict=True)
            torch._foreach_copy_(list(working), list(masters))  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        """The masters, which hold more than the model's own parameters do. Empty for a float32 model."""
        return {"masters": [master.detach() for _, master in self.pairs]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the masters of an earlier ``state_dict``, and round them into the model.

        Raises ``CheckpointError`` if they belong to another model or precision.
        """
        found, wanted = state["masters"], [master for _, master in self.pairs]
        if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in wanted]:
            raise CheckpointError(
                f"{len(found)} master weights were saved, and this model has {len(wanted)} (or other shapes)",
                way_out="resume with the model, adapter and precision of the run that wrote the checkpoint",
            )
        for master, saved in zip(wanted, found, strict=True):
            master.copy_(saved)
        self.copy_back()

    def close(self) -> None:
        """Take the hooks off: gradients stay with the parameters, whatever their precision, again."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.vocabulary:
            delattr(layer, _GRADIENT_SUM)
        for parameter in self.parameters:
            parameter.grad = None
        self.hooks.clear()
        self.vocabulary.clear()


_UNROUNDED = "trueup_unrounded"


def round_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the model's float32 parameters to ``dtype``, in place, and keep what that loses for ``MasterWeights``.

    Weights that start on bfloat16's grid leave it all at once and by the same step: the first updates of Adam are ± the
    learning rate, whatever the gradient, and rounding makes them all larger, or nothing, by the size of the weight. Off
    the grid such errors cancel. Buffers (the frequencies of rotary embeddings) stay as they are.
    """
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 != dtype:
            exact = parameter.detach()
            parameter.data = exact.to(dtype)
            if parameter.requires_grad:
                setattr(parameter, _UNROUNDED, exact)


def _unrounded(parameter: torch.nn.Parameter) -> Tensor:
    """The float32 values to train on from here; the parameter keeps them no longer."""
    exact = vars(parameter).pop(_UNROUNDED, None)
    return parameter.detach().to(torch.float32) if exact is None else exact.to(parameter.device)


def hand_over_to(master: torch.nn.Parameter) -> Any:
    """A hook that adds a parameter's finished gradient to ``master.grad`` in float32, and frees it."""

    def hand_over(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.to(torch.float32)
        else:
            master.grad.add_(gradient)
        parameter.grad = None

    return hand_over


_GRADIENT_SUM = "trueup_gradient_sum"


def gradient_sum(layer: torch.nn.Module) -> Tensor | None:
    """Where the gradient of this layer's weight is to be added, in float32, in place of being handed to autograd; None
    for a layer that no ``MasterWeights`` has among its ``vocabulary``."""
    return getattr(layer, _GRADIENT_SUM, None)


def embed_with_sum(layer: Any, inputs: Any, embeddings: Tensor) -> Tensor:
    """A forward hook: the same embeddings, whose gradient goes to ``gradient_sum(layer)``."""
    if not torch.is_grad_enabled():
        return embeddings
    return _EmbedWithSum.apply(layer.weight, embeddings.detach(), inputs[0], layer)  # pyright: ignore[reportReturnType]


class _EmbedWithSum(torch.autograd.Function):
    """The weight is an argument so that there is a backward pass; what it gets from autograd is nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, embeddings: Tensor, tokens: Tensor, layer: torch.nn.Embedding) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.layer = layer
        return embeddings.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, total = ctx.saved_tensors[0].flatten(), getattr(ctx.layer, _GRADIENT_SUM)
        rows = grad.flatten(0, -2).to(total.dtype)
        if ctx.layer.padding_idx is not None:  # whose embedding is not trained
            rows = rows.masked_fill((tokens == ctx.layer.padding_idx).unsqueeze(-1), 0)
        total.index_add_(0, tokens, rows)
        return None, None, None, None
