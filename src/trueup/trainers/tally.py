"""What a step or an evaluation adds up to, over its micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trueup.records import CompletionGroup


@dataclass(frozen=True)
class Totals:
    """Denominators over a whole step. A micro-batch divides by these, so that the gradients of the micro-batches add up
    to the gradient of the one big batch, however it is cut."""

    groups: int
    completions: int
    tokens: int
    """Scored tokens: where the completion mask is True."""

    @classmethod
    def of(cls, groups: Sequence[CompletionGroup]) -> Totals:
        completions = [completion for group in groups for completion in group.completions]
        tokens = sum(int(completion.completion_mask.sum()) for completion in completions)
        return cls(groups=len(groups), completions=len(completions), tokens=tokens)


@dataclass
class Tally:
    """Adds up micro-batches: the loss as a sum (each is divided by the ``Totals`` already), metrics as their values."""

    loss: float = 0.0
    tokens: int = 0
    values: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor], tokens: int) -> None:
        self.loss += float(loss.detach())
        self.tokens += tokens
        for name, values in metrics.items():
            self.values[name].append(values.detach().float().flatten().cpu())

    def all(self, name: str) -> Tensor:
        """Every value of one metric, in the order of the groups that were added."""
        return torch.cat(self.values[name])

    def means(self) -> dict[str, float]:
        """The loss, and the mean of every metric over its values."""
        return {"loss": self.loss} | {name: self.all(name).mean().item() for name in self.values}
