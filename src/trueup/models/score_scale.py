"""How the scores of a reward model are read: shifted, and perhaps scaled, by two numbers in its config.

Comparisons say nothing about where zero is, nor does the head: ``AutoModelForSequenceClassification`` gives it no bias,
and one that is saved with it is dropped at the next load. So the weights stay what was trained, and ``score_mean`` and
``score_std`` in ``config.json`` say how to read them. Every other library ignores the two and gives the raw score,
which differs by a constant (and a factor): all differences between scores, and so all that was learned, are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from trueup.errors import ModelError

Number = TypeVar("Number", float, np.ndarray)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreScale:
    """score = (raw score − ``score_mean``) / ``score_std``. Raises ``ModelError`` unless both are finite, std > 0."""

    score_mean: float = 0.0
    score_std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.score_mean) and 0 < self.score_std < math.inf):
            raise ModelError(
                f"scores can't be read with mean {self.score_mean} and standard deviation {self.score_std}",
                where="score_mean, score_std",
                way_out="both are finite numbers, and the standard deviation is above 0",
            )

    def __call__(self, raw: Number) -> Number:
        return (raw - self.score_mean) / self.score_std

    def then(self, later: ScoreScale) -> ScoreScale:
        """Both, one after the other: ``s.then(t)(raw) == t(s(raw))``."""
        return ScoreScale(
            score_mean=self.score_mean + self.score_std * later.score_mean,
            score_std=self.score_std * later.score_std,
        )

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> ScoreScale:
        """What ``fields`` (of a config, say) hold of it; nothing is mean 0 and standard deviation 1."""
        return cls(**{name: float(fields[name]) for name in cls.__slots__ if fields.get(name) is not None})

    def fields(self) -> dict[str, float]:
        """What ``of`` reads."""
        return asdict(self)
