"""What every rollout engine does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from trueup.records import CompletionGroup
from trueup.rollout.settings import SamplingParams


class Engine(Protocol):
    """Writes completions with one model.

    ``generate`` gives the groups in the order of the prompts, each with ``sampling.num_completions`` completions that
    carry ``stop_reason``, ``sampler_logprobs`` (of the distribution that was sampled) and ``untempered_logprobs`` (of
    the model's own: temperature 1, nothing cut). ``requests``: the number of each prompt, which keys its random
    streams; its place in the call if not given. ``progress`` is called with the number of tokens written since its
    last call. ``update_weights``: take over the weights of a model of the same shape, in place.
    """

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingParams,
        *,
        requests: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[CompletionGroup]: ...

    def update_weights(self, model: Any) -> None: ...
