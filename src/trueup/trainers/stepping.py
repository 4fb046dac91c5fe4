"""From accumulated gradients to the next parameters: master weights, clipping, schedule, optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trueup.errors import ModelError
from trueup.models.precision import MasterWeights
from trueup.models.scorer import vocabulary_layers
from trueup.trainers.settings import TrainSettings


def lr_scale(step: int, *, warmup_steps: int, total_steps: int, schedule: str) -> float:
    """Factor on the peak learning rate for the update number ``step`` (from 0).

    Warm-up rises as ``(step + 1) / warmup_steps``, so that the first update is not lost; after it the factor stays at 1
    or falls to 0 at ``total_steps``: linearly, or as ``(1 + cos πx) / 2``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    x = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - x if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * x))


def build_optimizer(parameters: Iterable[Tensor], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimiser over ``parameters``; adamw spares vectors (biases, norms) the weight decay, as is usual."""
    parameters = list(parameters)
    lr, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, weight_decay=decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, weight_decay=decay)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One pass over memory in place of a dozen, where PyTorch has it.
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=fused)


class Stepper:
    """The trainable parameters of a module and what updates them.

    After the backward passes of a batch, ``step(n)`` clips the gradient, sets the learning rate of update ``n``, and
    moves the parameters. A gradient that is not finite moves nothing; the caller sees it in the returned norm.
    ``close`` it when done. Raises ``ModelError`` for a module without trainable parameters.
    """

    def __init__(self, module: nn.Module, settings: TrainSettings, total_steps: int) -> None:
        self.settings, self.total_steps = settings, total_steps
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ModelError("every parameter is frozen", way_out="model.requires_grad_(True), or --lora-rank")
        self.names = tuple(trainable)
        self.masters = MasterWeights(trainable.values(), vocabulary_layers(module))
        self.optimizer = build_optimizer(self.masters.parameters, settings)

    def step(self, step: int) -> tuple[float, float]:
        """Make update number ``step``; returns (gradient norm before clipping, learning rate)."""
        settings = self.settings
        scale = lr_scale(
            step, warmup_steps=settings.warmup_steps, total_steps=self.total_steps, schedule=settings.lr_schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * scale
        gradients = [parameter.grad for parameter in self.masters.parameters if parameter.grad is not None]
        total_norm = nn.utils.get_total_norm(gradients)
        norm = total_norm.item()
        if math.isfinite(norm):
            if norm > settings.max_grad_norm:
                nn.utils.clip_grads_with_norm_(self.masters.parameters, settings.max_grad_norm, total_norm)
            self.optimizer.step()
            self.masters.copy_back()
        self.masters.clear_gradients()
        return norm, settings.learning_rate * scale

    def skip(self) -> tuple[float, float]:
        """Forget the accumulated gradients: the loss was not finite. Returns what ``step`` would, without numbers."""
        self.masters.clear_gradients()
        return math.nan, math.nan

    def close(self) -> None:
        """Let go of the module: a later run on the same object gets its gradients itself."""
        self.masters.close()

    def is_finite(self) -> bool:
        """Whether every parameter is a finite number."""
        return all(bool(parameter.isfinite().all()) for parameter in self.masters.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on: parameters (in float32) and the optimiser's moments."""
        parameters = {name: p.detach() for name, p in zip(self.names, self.masters.parameters, strict=True)}
        return {"parameters": parameters, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier ``state_dict``. Raises ``KeyError`` for a parameter that is not in it."""
        with torch.no_grad():
            for name, parameter in zip(self.names, self.masters.parameters, strict=True):
                parameter.copy_(state["parameters"][name])
        self.masters.copy_back()
        self.optimizer.load_state_dict(state["optimizer"])
