"""Action spaces: from a network's outputs to actions, their log-probs, entropy and KL divergence.

Two kinds cover Gymnasium's spaces. ``Choices``: one or several independent categorical choices (``Discrete``,
``MultiDiscrete``). ``Gaussian``: real numbers (``Box``), normally distributed with a spread that doesn't depend on the
state. What a network puts out and the parameters beside it are the distribution's *parameters*, a tuple of tensors.

Acting is NumPy, on outputs [..., A] and noise drawn beforehand; learning is torch, on the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trueup.errors import DataError
from trueup.objectives.divergence import categorical_kl

Parameters = tuple[Tensor, ...]


@dataclass(frozen=True)
class Choices:
    """Independent choices, each among ``sizes[k]`` options; logits of all of them stand side by side.

        π(a|s) = Π_k softmax(z_k)[a_k]

    Actions are stored as floats [..., K], counted from 0; the environment gets integers counted from ``starts``.
    """

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    single: bool
    """Whether the environment takes one number (``Discrete``) and not a list of them."""

    has_spread = False

    @property
    def num_outputs(self) -> int:
        return sum(self.sizes)

    @property
    def size(self) -> int:
        return len(self.sizes)

    @cached_property
    def parts(self) -> tuple[slice, ...]:
        """Where each choice's logits are."""
        ends = np.cumsum(self.sizes)
        return tuple(slice(int(end) - size, int(end)) for end, size in zip(ends, self.sizes, strict=True))

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Gumbel noise: the largest of logits + noise is a sample of their softmax (Gumbel 1954)."""
        return -np.log(rng.standard_exponential((*shape, self.num_outputs), dtype=np.float32))

    def act(self, outputs: np.ndarray, noise: np.ndarray | None, log_std: np.ndarray | None = None) -> np.ndarray:
        """A sample, [..., K]; without noise the most probable action."""
        scores = outputs if noise is None else outputs + noise
        if len(self.sizes) == 1:
            return scores.argmax(-1, keepdims=True)
        return np.stack([scores[..., part].argmax(-1) for part in self.parts], -1)

    def for_environment(self, actions: np.ndarray) -> np.ndarray:
        whole = actions.astype(np.int64) + np.array(self.starts)
        return whole[..., 0] if self.single else whole

    def logprobs(self, parameters: Parameters, actions: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
        chosen = actions.long()
        each = [
            torch.log_softmax(parameters[0][..., part], -1).gather(-1, chosen[..., index : index + 1]).squeeze(-1)
            for index, part in enumerate(self.parts)
        ]
        return each[0] if len(each) == 1 else torch.stack(each).sum(0)

    def entropy(self, parameters: Parameters) -> Float[Tensor, "*batch"]:
        """H = −Σ_k Σ_a π_k(a)·log π_k(a), in nats."""
        logs = [torch.log_softmax(parameters[0][..., part], -1) for part in self.parts]
        return -sum_of([(log.exp() * log).sum(-1) for log in logs])

    def kl(self, old: Parameters, new: Parameters) -> Float[Tensor, "*batch"]:
        """KL(old‖new) in nats: that of independent choices is the sum of theirs."""
        return sum_of(
            [
                categorical_kl(torch.log_softmax(old[0][..., part], -1), torch.log_softmax(new[0][..., part], -1))
                for part in self.parts
            ]
        )

    def derivatives(
        self,
        parameters: Parameters,
        actions: Float[Tensor, "*batch k"],
        by_logprobs: Float[Tensor, "*batch"],
        by_entropy: Float[Tensor, "*batch"] | None = None,
        by_kl: Float[Tensor, "*batch"] | None = None,
        old: Parameters = (),
    ) -> tuple[Tensor, ...]:
        """From a loss's derivatives by log-probs, entropy and KL (of ``old`` from these) to those by the logits.

        ∂log π(a)/∂z = 1_a − π,    ∂H/∂z = −π·(log π + H),    ∂KL(π_old‖π)/∂z = π − π_old
        """
        errors = torch.empty_like(parameters[0])
        chosen = actions.long()
        for index, part in enumerate(self.parts):
            logs = torch.log_softmax(parameters[0][..., part], -1)
            probabilities = logs.exp()
            error = probabilities * -by_logprobs.unsqueeze(-1)
            error.scatter_add_(-1, chosen[..., index : index + 1], by_logprobs.unsqueeze(-1))
            if by_entropy is not None:
                weighted = probabilities * logs
                spread = weighted - probabilities * weighted.sum(-1, keepdim=True)
                error -= by_entropy.unsqueeze(-1) * spread
            if by_kl is not None:
                error += by_kl.unsqueeze(-1) * (probabilities - torch.softmax(old[0][..., part], -1))
            errors[..., part] = error
        return (errors,)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions, of a mean for each state and a log standard deviation for all.

        π(a|s) = Π_k N(a_k; μ_k(s), σ_k²)

    Actions are stored as they were drawn. Only what the environment gets is clipped to its bounds: the log-prob is
    that of the draw, of which the environment's clipping is a part that the policy doesn't know.
    """

    low: np.ndarray
    high: np.ndarray
    shape: tuple[int, ...]

    has_spread = True

    @property
    def num_outputs(self) -> int:
        return self.low.size

    @property
    def size(self) -> int:
        return self.low.size

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal((*shape, self.size), dtype=np.float32)

    def act(self, outputs: np.ndarray, noise: np.ndarray | None, log_std: np.ndarray | None) -> np.ndarray:
        """A sample, [..., A]; without noise the mean."""
        if noise is None:
            return outputs
        assert log_std is not None
        return outputs + np.exp(log_std) * noise

    def for_environment(self, actions: np.ndarray) -> np.ndarray:
        inside = np.minimum(np.maximum(actions, self.low), self.high)
        return inside if len(self.shape) == 1 else inside.reshape(*actions.shape[:-1], *self.shape)

    def logprobs(self, parameters: Parameters, actions: Float[Tensor, "*batch a"]) -> Float[Tensor, "*batch"]:
        """Σ_k −½ ((a_k − μ_k)/σ_k)² − log σ_k − ½ log 2π"""
        mean, log_std = parameters
        scaled = (actions - mean) * torch.exp(-log_std)
        constant = 0.5 * math.log(2 * math.pi) * self.size
        return -0.5 * (scaled * scaled).sum(-1) - (log_std.sum(-1) + constant)

    def entropy(self, parameters: Parameters) -> Float[Tensor, "*batch"]:
        """Σ_k log σ_k + ½ log 2πe, in nats, of every state."""
        mean, log_std = parameters
        return (log_std.sum(-1) + 0.5 * math.log(2 * math.pi * math.e) * self.size).expand(mean.shape[:-1])

    def kl(self, old: Parameters, new: Parameters) -> Float[Tensor, "*batch"]:
        """Σ_k log σ'_k/σ_k + (σ_k² + (μ_k − μ'_k)²)/(2σ'_k²) − ½ of the new (′) from the old policy, in nats."""
        (mean, log_std), (new_mean, new_log_std) = old, new
        gap = new_log_std - log_std
        apart = ((mean - new_mean) * torch.exp(-new_log_std)).square()
        return (gap + 0.5 * (torch.exp(-2 * gap) + apart) - 0.5).sum(-1)

    def derivatives(
        self,
        parameters: Parameters,
        actions: Float[Tensor, "s b a"],
        by_logprobs: Float[Tensor, "s b"],
        by_entropy: Float[Tensor, "s b"] | None = None,
        by_kl: Float[Tensor, "s b"] | None = None,
        old: Parameters = (),
    ) -> tuple[Tensor, ...]:
        """From a loss's derivatives by log-probs, entropy and KL (of ``old`` from these) to those by μ and log σ.

        ∂log π(a)/∂μ = z/σ,    ∂log π(a)/∂log σ = z² − 1,    z = (a − μ)/σ,    ∂H/∂log σ = 1
        ∂KL(π_old‖π)/∂μ = (μ − μ_old)/σ²,    ∂KL(π_old‖π)/∂log σ = 1 − (σ_old² + (μ − μ_old)²)/σ²
        """
        mean, log_std = parameters
        by_logprobs = by_logprobs.unsqueeze(-1)
        inverse = torch.exp(-log_std)
        scaled = (actions - mean) * inverse
        by_mean = by_logprobs * scaled * inverse
        by_log_std = (by_logprobs * (scaled * scaled - 1)).sum(-2, keepdim=True)
        if by_entropy is not None:
            by_log_std = by_log_std + by_entropy.unsqueeze(-1).sum(-2, keepdim=True)
        if by_kl is not None:
            old_mean, old_log_std = old
            apart = (mean - old_mean) * inverse
            by_mean = by_mean + by_kl.unsqueeze(-1) * apart * inverse
            wide = torch.exp(2 * (old_log_std - log_std)) + apart * apart
            by_log_std = by_log_std + (by_kl.unsqueeze(-1) * (1 - wide)).sum(-2, keepdim=True)
        return by_mean, by_log_std


ActionSpace = Choices | Gaussian


def sum_of(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def action_space(space: Any) -> ActionSpace:
    """The action space of a Gymnasium space. Raises ``DataError`` for any other than Discrete, MultiDiscrete, Box."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return Choices((int(space.n),), (int(space.start),), single=True)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return Choices(tuple(map(int, space.nvec)), tuple(map(int, space.start)), single=False)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return Gaussian(space.low.ravel(), space.high.ravel(), tuple(space.shape))
    raise DataError(
        f"actions are {space}", way_out="Discrete, MultiDiscrete (one row) and Box of floats can be learned"
    )
