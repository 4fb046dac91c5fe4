"""Small fully connected networks, those of all runs in one: S runs cost little more than one.

A ``Network`` has trunks (hidden layers) and heads (an output layer each, on one of the trunks). Policy and value have a
trunk of their own each, computed together. All parameters are views into one flat vector: for autograd, clipping and
the optimiser a network is a single tensor.

At these sizes the calls are the cost, not the numbers. So forward and backward pass are written out in NumPy, which
calls the same products with less around them, and has a tanh that is several times as fast as PyTorch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

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


class Passed(NamedTuple):
    """What a forward pass leaves behind."""

    hidden: list[Float[np.ndarray, "trunk s b width"]]
    """What each layer passes on, the observations first."""
    outputs: list[Float[np.ndarray, "s b o"]]
    """Of each head."""


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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_runs, self.heads = len(seeds), tuple(heads)
        self.activation: Activation = activation
        self.num_inputs, self.hidden = num_inputs, tuple(hidden)
        self.num_trunks = 1 + max(head.trunk for head in heads)
        widths = (num_inputs, *hidden)
        trunk, runs = self.num_trunks * self.num_runs, self.num_runs
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (width, following) in enumerate(pairwise(widths)):
            shapes[f"trunk.{layer}.weight"] = (trunk, width, following)
            shapes[f"trunk.{layer}.bias"] = (trunk, 1, following)
        for number, head in enumerate(heads):
            shapes[f"head.{number}.weight"] = (runs, widths[-1], head.num_outputs)
            shapes[f"head.{number}.bias"] = (runs, 1, head.num_outputs)
        if spread:
            shapes["log_std"] = (runs, 1, spread)
        self.num_layers = len(hidden)
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        self.flat = torch.zeros(sum(sizes.values()), dtype=dtype)
        self.flat.grad = torch.zeros_like(self.flat)
        self.parameters: dict[str, Tensor] = {}
        """Views into ``flat`` by name."""
        self._gradient: dict[str, np.ndarray] = {}
        self._owner = torch.zeros(len(self.flat), dtype=torch.long)
        place = 0
        for name, shape in shapes.items():
            part = slice(place, place + sizes[name])
            self.parameters[name] = self.flat[part].view(shape)
            self._gradient[name] = self.flat.grad[part].view(shape).numpy()
            owners = torch.arange(shape[0]) % runs  # trunks: all runs' first, then all runs' second
            self._owner[part] = owners.repeat_interleave(sizes[name] // shape[0])
            place += sizes[name]
        self.arrays = {name: parameter.numpy() for name, parameter in self.parameters.items()}
        self._initialise(seeds, log_std)

    def _initialise(self, seeds: Sequence[int], log_std: float) -> None:
        for run, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in self.parameters.items():
                if not name.endswith("weight"):
                    continue
                part, number = name.split(".")[:2]
                gain = 2**0.5 if part == "trunk" else self.heads[int(number)].gain
                for matrix in parameter[run :: self.num_runs]:
                    torch.nn.init.orthogonal_(matrix.T, gain, generator=generator)
        if "log_std" in self.parameters:
            self.parameters["log_std"].fill_(log_std)

    def copy(self) -> Network:
        """Another network with the same parameters now."""
        other = Network(
            range(self.num_runs),
            self.num_inputs,
            self.heads,
            hidden=self.hidden,
            activation=self.activation,
            spread=self.parameters["log_std"].shape[-1] if "log_std" in self.parameters else 0,
            dtype=self.flat.dtype,
        )
        other.flat.copy_(self.flat)
        return other

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over parameters by name. Raises ``KeyError`` or ``RuntimeError`` where they don't fit."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def forward(self, observations: Float[np.ndarray, "s b d"]) -> Passed:
        """Each head's outputs, and what the backward pass needs."""
        hidden = self._hidden(observations, slice(None))
        return Passed(hidden, [self._head(number, hidden[-1][head.trunk]) for number, head in enumerate(self.heads)])

    def backward(self, passed: Passed, errors: Sequence[np.ndarray], spread: np.ndarray | None = None) -> None:
        """Put into ``flat.grad`` the gradient of a loss with the derivatives ``errors`` with respect to the outputs
        [S, B, O], and ``spread`` with respect to the log standard deviations [S, 1, A]."""
        gradient = self._gradient
        error = np.zeros((self.num_trunks, *passed.hidden[-1].shape[1:]), passed.hidden[-1].dtype)
        for number, (head, of_head) in enumerate(zip(self.heads, errors, strict=True)):
            weight, bias = f"head.{number}.weight", f"head.{number}.bias"
            inputs = passed.hidden[-1][head.trunk]
            np.matmul(inputs.swapaxes(-1, -2), of_head, out=gradient[weight])
            np.sum(of_head, axis=-2, keepdims=True, out=gradient[bias])
            error[head.trunk] += np.matmul(of_head, self.arrays[weight].swapaxes(-1, -2))
        if "log_std" in gradient:
            gradient["log_std"][:] = 0 if spread is None else spread
        for layer in reversed(range(self.num_layers)):
            weight, bias = f"trunk.{layer}.weight", f"trunk.{layer}.bias"
            outputs, inputs = passed.hidden[layer + 1], passed.hidden[layer]
            error *= 1 - outputs * outputs if self.activation == "tanh" else outputs > 0
            np.matmul(inputs.swapaxes(-1, -2), error, out=self._by_trunk(gradient[weight]))
            np.sum(error, axis=-2, keepdims=True, out=self._by_trunk(gradient[bias]))
            if layer:
                error = np.matmul(error, self._by_trunk(self.arrays[weight]).swapaxes(-1, -2))

    def clip_gradient(self, most: float) -> None:
        """Scale each run's gradient down to norm ``most``."""
        gradient = self.flat.grad
        assert gradient is not None
        if self.num_runs == 1:
            gradient *= (most / (gradient.norm() + 1e-6)).clamp(max=1)
        else:
            squares = gradient.new_zeros(self.num_runs).index_add_(0, self._owner, gradient.square())
            gradient *= (most / (squares.sqrt() + 1e-6)).clamp(max=1)[self._owner]

    def act(self, observations: Float[np.ndarray, "s n d"], head: int = 0) -> Float[np.ndarray, "s n o"]:
        """One head's outputs, from its trunk alone."""
        trunk = self.heads[head].trunk
        return self._head(head, self._hidden(observations, slice(trunk, trunk + 1))[-1][0])

    def _hidden(self, observations: np.ndarray, trunks: slice) -> list[np.ndarray]:
        """What each layer passes on, the observations first: [trunk, S, B, width]."""
        passed = [observations[None]]
        for layer in range(self.num_layers):
            weight, bias = (self._by_trunk(self.arrays[f"trunk.{layer}.{name}"])[trunks] for name in ("weight", "bias"))
            hidden = np.matmul(passed[-1], weight)
            hidden += bias
            if self.activation == "tanh":
                np.tanh(hidden, out=hidden)
            else:
                np.maximum(hidden, 0, out=hidden)
            passed.append(hidden)
        return passed

    def _head(self, number: int, hidden: np.ndarray) -> np.ndarray:
        outputs = np.matmul(hidden, self.arrays[f"head.{number}.weight"])
        outputs += self.arrays[f"head.{number}.bias"]
        return outputs

    def _by_trunk(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.num_trunks, self.num_runs, *array.shape[1:])
