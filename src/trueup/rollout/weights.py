"""A copy of a model to sample from, which shares what it can with the model that is trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trueup.errors import ModelError
from trueup.models.adapters import has_adapter, merged_weights, plain_model


def sampling_copy(model: nn.Module, dtype: torch.dtype) -> Any:
    """The model without adapters and without gradients, in eval mode, its modules and config its own.

    Weights that are of ``dtype`` already share the memory of the model's; others, and those that have an adapter added
    to them, are copies. ``copy_weights`` takes them over. A quantized model's weights stay as they are.
    """
    given = plain_model(model)
    memo: dict[int, Any] = {}
    for module in given.modules():
        # Tensors that are neither parameters nor buffers (sums of gradients) are no business of the copy.
        memo |= {id(each): each for each in vars(module).values() if isinstance(each, Tensor)}
    for parameter in given.parameters():
        # Weights that a model keeps in another type than the rest stay in it.
        own = parameter.dtype if parameter.dtype != given.dtype or _is_quantized(given) else dtype
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(own), requires_grad=False)
    made = copy.deepcopy(given, memo)
    _take_off_adapters(made)
    if has_adapter(given):
        own_weights = made.state_dict()
        for name, tensor, summed in merged_weights(given):
            if summed:
                made.get_parameter(name).data = tensor.to(own_weights[name].dtype)
    return made.eval().requires_grad_(False)


def copy_weights(made: Any, model: nn.Module) -> None:
    """Take over the weights of a model of the same shape: where they are shared, by sharing this model's.

    Raises ``ModelError`` if a weight is missing or has another shape.
    """
    given = plain_model(model)
    own = made.state_dict()
    found = 0
    for name, tensor, summed in merged_weights(given):
        if name not in own:
            continue
        mine = own[name]
        if mine.shape != tensor.shape:
            raise ModelError(
                f"{name} is {tuple(tensor.shape)}, and the engine's is {tuple(mine.shape)}",
                way_out="make an engine of the new model",
            )
        found += 1
        if mine.dtype == tensor.dtype and not summed and isinstance(_holder(made, name), nn.Parameter):
            _holder(made, name).data = tensor.detach()
        else:
            mine.copy_(tensor)
    if found < len(own):
        raise ModelError(
            f"{len(own) - found} of the engine's {len(own)} weights are missing from {type(given).__name__}",
            way_out="make an engine of the new model",
        )


def _holder(module: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last)


def _is_quantized(model: Any) -> bool:
    return getattr(model, "is_quantized", False)


def _take_off_adapters(module: nn.Module) -> None:
    """Put every adapted layer's own layer, or the copy of it that is trained in full, back in its place."""
    for name, child in list(module.named_children()):
        if hasattr(child, "get_base_layer"):
            setattr(module, name, child.get_base_layer())  # pyright: ignore[reportCallIssue]
        elif hasattr(child, "modules_to_save"):
            setattr(module, name, child.modules_to_save["default"])  # pyright: ignore
        else:
            _take_off_adapters(child)
