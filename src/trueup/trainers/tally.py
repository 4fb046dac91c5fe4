"""What a step or an evaluation adds up to, over its micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from trueup.records import CompletionGroup


@dataclass(frozen=True)
class Totals:
    """What a micro-batch must know of its whole step, so that the gradients of the micro-batches add up to the gradient
    of the one big batch, however it is cut: denominators, and what couples the batch."""

    groups: int
    completions: int
    tokens: int
    """Scored tokens: where the completion mask is True."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """Computed over the whole step, without gradient; one row for each of its groups."""
    steps: int = 0
    """Labelled steps of completions that are divided into steps."""

    @classmethod
    def of(cls, groups: Sequence[CompletionGroup], statistics: Mapping[str, Tensor] | None = None) -> Totals:
        completions = [completion for group in groups for completion in group.completions]
        tokens = sum(int(completion.completion_mask.sum()) for completion in completions)
        labels = [completion.step_labels for completion in completions if completion.step_labels is not None]
        steps = sum(int((~np.isnan(each)).sum()) for each in labels)
        return cls(len(groups), len(completions), tokens, statistics or {}, steps)

    def at(self, indices: Sequence[int]) -> Totals:
        """The same totals for a micro-batch of these groups: the statistics cut down to its rows."""
        return replace(self, statistics={name: rows[list(indices)] for name, rows in self.statistics.items()})


@dataclass
class Tally:
    """Adds up micro-batches: the loss as a sum (each is divided by the ``Totals`` already), metrics as their values."""

    loss: float = 0.0
    tokens: int = 0
    values: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    sizes: list[int] = field(default_factory=list)
    """Completions of each group."""

    def add(
        self, loss: Tensor, metrics: Mapping[str, Tensor], tokens: int, groups: Sequence[CompletionGroup] = ()
    ) -> None:
        self.loss += float(loss.detach())
        self.tokens += tokens
        self.sizes += [len(group.completions) for group in groups]
        for name, values in metrics.items():
            self.values[name].append(values.detach().float().flatten().cpu())

    def all(self, name: str) -> Tensor:
        """Every value of one metric, in the order of the groups that were added."""
        return torch.cat(self.values[name])

    def lists(self) -> np.ndarray:
        """Of every pair that the groups' rankings imply, in the order of the metrics of pairs: the group it is of."""
        return np.repeat(np.arange(len(self.sizes)), [size * (size - 1) // 2 for size in self.sizes])

    def means(self) -> dict[str, float]:
        """The loss, and the mean of every metric over its values; a metric that has none is left out."""
        known = (name for name in self.values if len(self.all(name)))
        return {"loss": self.loss} | {name: self.all(name).mean().item() for name in known}
