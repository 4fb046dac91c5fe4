"""Action spaces: from a network's outputs to actions, their log-probs, entropy and KL divergence.

Two kinds cover Gymnasium's spaces. ``Choices``: one or several independent categorical choices (``Discrete``,
``MultiDiscrete``). ``Gaussian``: real numbers (``Box``), normally distributed with a spread that doesn't depend on the
state. What defines a distribution are its *parameters*, a tuple of tensors; ``parameters`` makes them of a network's
outputs.

Acting is NumPy, on outputs [..., A] and noise drawn beforehand; learning is torch, on parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trueup.errors import DataError
from trueup.objectives import derivatives
from trueup.objectives.divergence import categorical_kl
from trueup.objectives.gaussian import gaussian_entropy, gaussian_kl, gaussian_logprobs
from trueup.objectives.logprobs import entropy

Parameters = tuple[Tensor, ...]
_SMALLEST = np.finfo(np.float32).tiny
"""In float32 an exponential draw is exactly 0 once in some millions."""


@dataclass(frozen=True)
class Choices:
    """Independent choices, each among ``sizes[k]`` options; logits of all of them stand side by side.

        π(a|s) = Π_k softmax(z_k)[a_k]

    Parameters: the log-probs of all options, normalised, side by side as the logits are.
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
        drawn = rng.standard_exponential((*shape, self.num_outputs), dtype=np.float32)
        return -np.log(np.maximum(drawn, _SMALLEST))

    def act(self, outputs: np.ndarray, noise: np.ndarray | None, log_std: np.ndarray | None = None) -> np.ndarray:
        """A sample, [..., K]; without noise the most probable action."""
        scores = outputs if noise is None else outputs + noise
        if len(self.sizes) == 1:
            return scores.argmax(-1, keepdims=True)
        return np.stack([scores[..., part].argmax(-1) for part in self.parts], -1)

    def for_environment(self, actions: np.ndarray) -> np.ndarray:
        whole = actions.astype(np.int64) + np.array(self.starts)
        return whole[..., 0] if self.single else whole

    def parameters(self, outputs: Float[Tensor, "*batch z"], log_std: Tensor | None = None) -> Parameters:
        return (beside([torch.log_softmax(logits, -1) for logits in self._each(outputs)]),)

    def logprobs(self, parameters: Parameters, actions: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
        """Of independent choices the sum of theirs; so are entropy and KL."""
        places = actions.long()
        if self.size > 1:
            places = places + torch.tensor([part.start for part in self.parts])
        return parameters[0].gather(-1, places).sum(-1)

    def entropy(self, parameters: Parameters) -> Float[Tensor, "*batch"]:
        """In nats."""
        return sum_of(map(entropy, self._each(parameters[0])))

    def kl(self, old: Parameters, new: Parameters) -> Float[Tensor, "*batch"]:
        """KL(old‖new) in nats."""
        return categorical_kl(old[0], new[0])

    def derivatives(
        self,
        parameters: Parameters,
        actions: Float[Tensor, "*batch k"],
        by_logprobs: Float[Tensor, "*batch"],
        by_entropy: Float[Tensor, "*batch"] | None = None,
        by_kl: Float[Tensor, "*batch"] | None = None,
        old: Parameters = (),
    ) -> tuple[Tensor, ...]:
        """From a loss's derivatives by log-probs, entropy and KL (of ``old`` from these) to those by the logits."""
        given = {"by_logprobs": by_logprobs, "by_entropy": by_entropy, "by_kl": by_kl}
        olds = [None] * self.size if by_kl is None else self._each(old[0])
        choices = zip(self._each(parameters[0]), actions.long().unbind(-1), olds, strict=True)
        errors = [derivatives.softmax(one, chosen, **given, old_logprobs=one_old) for one, chosen, one_old in choices]
        return (beside(errors),)

    def _each(self, of_all: Float[Tensor, "*batch z"]) -> list[Tensor]:
        """The part of each choice."""
        return [of_all[..., part] for part in self.parts]


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions, of a mean for each state and a log standard deviation for all.

        π(a|s) = Π_k N(a_k; μ_k(s), σ_k²)

    Parameters: the means, and log σ of all states. Actions are stored as they were drawn. Only what the environment
    gets is clipped to its bounds: clipping belongs to the environment, the log-prob is the draw's.
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

    def parameters(self, outputs: Float[Tensor, "*batch a"], log_std: Tensor | None = None) -> Parameters:
        assert log_std is not None
        return outputs, log_std

    def logprobs(self, parameters: Parameters, actions: Float[Tensor, "*batch a"]) -> Float[Tensor, "*batch"]:
        mean, log_std = parameters
        return gaussian_logprobs(mean, log_std, actions)

    def entropy(self, parameters: Parameters) -> Float[Tensor, "*batch"]:
        """In nats, of every state, though it is the same of all."""
        mean, log_std = parameters
        return gaussian_entropy(log_std).expand(mean.shape[:-1])

    def kl(self, old: Parameters, new: Parameters) -> Float[Tensor, "*batch"]:
        """KL(old‖new) in nats."""
        return gaussian_kl(*old, *new)

    def derivatives(
        self,
        parameters: Parameters,
        actions: Float[Tensor, "s b a"],
        by_logprobs: Float[Tensor, "s b"],
        by_entropy: Float[Tensor, "s b"] | None = None,
        by_kl: Float[Tensor, "s b"] | None = None,
        old: Parameters = (),
    ) -> tuple[Tensor, ...]:
        """From a loss's derivatives by log-probs, entropy and KL (of ``old`` from these) to those by μ and log σ."""
        mean, log_std = parameters
        given = {"by_logprobs": by_logprobs, "by_entropy": by_entropy, "by_kl": by_kl}
        return derivatives.gaussian(mean, log_std, actions, **given, old=(old[0], old[1]) if old else None)


ActionSpace = Choices | Gaussian


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


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
