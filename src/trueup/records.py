"""What flows through the library: a prompt and its K completions, as text and as tokens.

Supervised fine-tuning has K = 1, preference pairs K = 2, ranked lists and sampled groups any K. The same two records
serve them all, so that nothing downstream branches on where the data came from. Plain Python and NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

Message = Mapping[str, Any]
"""One chat message: ``role`` and ``content``, and whatever else the model's template reads."""

Text = str | tuple[Message, ...]
"""Plain text, or a conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedCompletions:
    """One prompt and its K completions as text, the best first (K = 1: a demonstration; K = 2: chosen, rejected).

    ``prompt`` and every completion are of one kind: all plain text, or all conversations.
    ``where`` names the row for messages, ``margin`` says by how much the first is better than the second, if known.
    ``desirable`` says of each completion by itself whether it is good: then they are not ranked (unpaired data).
    ``steps``: of each completion, the steps that it consists of; ``completions`` has them joined by line breaks.
    ``step_labels``: of each step, how right it is, in [0, 1]; None where nobody said. Then they are not ranked either.
    """

    prompt: Text
    completions: tuple[Text, ...]
    where: str = ""
    margin: float | None = None
    desirable: tuple[bool, ...] | None = None
    steps: tuple[tuple[str, ...], ...] | None = None
    step_labels: tuple[tuple[float | None, ...], ...] | None = None


class StopReason(StrEnum):
    """Why a completion ends."""

    END = "end"
    """It ends with the end token (or an end-of-turn token), which is trained."""
    STOP = "stop"
    """It hit a stop string."""
    LENGTH = "length"
    """It was cut: the end was never seen, so nothing may be learned about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The tokens of one completion.

    ``tokens``: int64 [T], end token included. ``mask``: bool [T], True where the model wrote the token (tool output
    and other people's turns are False); None means everywhere. From the engine: ``sampler_logprobs``, float32 [T], of
    the distribution that was really sampled; ``untempered_logprobs``, float32 [T], of the model's own (temperature 1,
    no token cut off). ``step_ends``: int64 [M], ascending: the index of each step's last token, where the completion
    is divided into steps. ``step_labels``: float32 [M], how right each step is, in [0, 1]; NaN where nobody said.
    """

    tokens: np.ndarray
    mask: np.ndarray | None = None
    stop_reason: StopReason = StopReason.END
    sampler_logprobs: np.ndarray | None = None
    untempered_logprobs: np.ndarray | None = None
    step_ends: np.ndarray | None = None
    step_labels: np.ndarray | None = None

    @property
    def completion_mask(self) -> np.ndarray:
        """bool [T]: which tokens are scored."""
        return np.ones(len(self.tokens), dtype=bool) if self.mask is None else self.mask

    @property
    def truncated(self) -> bool:
        return self.stop_reason is StopReason.LENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionGroup:
    """One prompt, int64 [P] with P ≥ 1, and its K completions; for preferences the best comes first.

    ``margin`` and ``desirable`` as in ``RankedCompletions``.
    """

    prompt: np.ndarray
    completions: tuple[Completion, ...]
    where: str = ""
    margin: float | None = None
    desirable: tuple[bool, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in the tree: the prompt once, every completion once."""
        return len(self.prompt) + sum(len(completion.tokens) for completion in self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One step of an environment. ``terminated`` ends the return; ``truncated`` only cuts the recording."""

    state: Any
    action: Any
    reward: float
    next_state: Any
    terminated: bool = False
    truncated: bool = False
