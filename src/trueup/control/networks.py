"""Small fully connected networks, those of all runs in one: S runs cost little more than one.

A ``Network`` has trunks (hidden layers) and heads (an output layer each, on one of the trunks). Policy and value have a
trunk of their own each, computed as one batched product. Every parameter is a view into one flat vector, so that
clipping and the optimiser take a handful of operations.

``Network.forward`` is what is differentiated; ``Network.act`` is the same in NumPy for a few states at a time, where
the calls are the cost and not the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Activation = Literal["tanh", "relu"]


@dataclass(frozen=True)
class Head:
    """An output layer: which trunk it reads, how many numbers it puts out, and the scale of its first weights."""

    trunk: int
    num_outputs: int
    gain: float


class Network:
    """S copies of trunks and heads, and, if ``spread`` is given, a log standard deviation for each of so many actions.

    Weights begin orthogonal with gain √2 (heads: their own), biases at 0; each run's come from its own seed.
    Source: Saxe et al. 2014 (arXiv 1312.6120); in PPO: Huang et al. 2022, "The 37 implementation details of proximal
    policy optimization".
    """

    def __init__(
        self,
        seeds: Sequence[int],
        num_inputs: int,
        heads: Sequence[Head],
        *,
        hidden: Sequence[int] = (64, 64),
        activation: Activation = "tanh",
        spread: int = 0,
        log_std: float = 0.0,
    ) -> None:
        self.num_runs, self.heads, self.activation = len(seeds), tuple(heads), activation
        self.num_inputs, self.hidden = num_inputs, tuple(hidden)
        self.num_trunks = 1 + max(head.trunk for head in heads)
        widths = (num_inputs, *hidden)
        trunk, runs = self.num_trunks * self.num_runs, self.num_runs
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (width, following) in enumerate(zip(widths, widths[1:], strict=False)):
            shapes[f"trunk.{layer}.weight"] = (trunk, width, following)
            shapes[f"trunk.{layer}.bias"] = (trunk, 1, following)
        for number, head in enumerate(heads):
            shapes[f"head.{number}.weight"] = (runs, widths[-1], head.num_outputs)
            shapes[f"head.{number}.bias"] = (runs, 1, head.num_outputs)
        if spread:
            shapes["log_std"] = (runs, 1, spread)
        self.num_layers = len(hidden)
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        self.flat = torch.zeros(sum(sizes.values()))
        self.gradient = torch.zeros_like(self.flat)
        self.parameters: dict[str, Tensor] = {}
        self.owner = torch.zeros(len(self.flat), dtype=torch.long)
        """Which run each entry of the flat vector belongs to."""
        place = 0
        for name, shape in shapes.items():
            part = slice(place, place + sizes[name])
            parameter = self.flat[part].view(shape).requires_grad_()
            parameter.grad = self.gradient[part].view(shape)
            self.parameters[name] = parameter
            owners = torch.arange(shape[0]) % self.num_runs  # trunks: all runs' first, then all runs' second
            self.owner[part] = owners.repeat_interleave(sizes[name] // shape[0])
            place += sizes[name]
        self.arrays = {name: parameter.detach().numpy() for name, parameter in self.parameters.items()}
        self._initialise(seeds, log_std)

    def _initialise(self, seeds: Sequence[int], log_std: float) -> None:
        for run, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in self.parameters.items():
                if not name.endswith("weight"):
                    continue
                part, number = name.split(".")[:2]
                gain = 2**0.5 if part == "trunk" else self.heads[int(number)].gain
                for matrix in parameter.data[run :: self.num_runs]:
                    torch.nn.init.orthogonal_(matrix.T, gain, generator=generator)
        if "log_std" in self.parameters:
            self.parameters["log_std"].data.fill_(log_std)

    @property
    def log_std(self) -> Tensor:
        return self.parameters["log_std"]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over parameters by name. Raises ``KeyError`` or ``RuntimeError`` where they don't fit."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])

    def clip_gradient(self, most: float) -> Float[Tensor, " s"]:
        """Scale each run's gradient down to norm ``most``, and return the norms that they had."""
        squares = torch.zeros(self.num_runs).index_add_(0, self.owner, self.gradient.square())
        norms = squares.sqrt()
        self.gradient *= (most / (norms + 1e-6)).clamp(max=1)[self.owner]
        return norms

    def forward(self, observations: Float[Tensor, "s b d"]) -> list[Float[Tensor, "s b o"]]:
        """Each head's outputs."""
        parameters = self.parameters
        hidden = observations.repeat(self.num_trunks, 1, 1)
        for layer in range(self.num_layers):
            hidden = torch.baddbmm(parameters[f"trunk.{layer}.bias"], hidden, parameters[f"trunk.{layer}.weight"])
            hidden = torch.tanh(hidden) if self.activation == "tanh" else torch.relu(hidden)
        trunks = hidden.chunk(self.num_trunks)
        return [
            torch.baddbmm(parameters[f"head.{number}.bias"], trunks[head.trunk], parameters[f"head.{number}.weight"])
            for number, head in enumerate(self.heads)
        ]

    def act(self, observations: Float[np.ndarray, "s n d"], head: int = 0) -> Float[np.ndarray, "s n o"]:
        """One head's outputs, from its trunk alone."""
        first = self.heads[head].trunk * self.num_runs
        runs = slice(first, first + self.num_runs)
        hidden = observations
        for layer in range(self.num_layers):
            hidden = np.matmul(hidden, self.arrays[f"trunk.{layer}.weight"][runs])
            hidden += self.arrays[f"trunk.{layer}.bias"][runs]
            if self.activation == "tanh":
                np.tanh(hidden, out=hidden)
            else:
                np.maximum(hidden, 0, out=hidden)
        return np.matmul(hidden, self.arrays[f"head.{head}.weight"]) + self.arrays[f"head.{head}.bias"]
