"""How an evaluation is summed up: its figures and, where scores are log-odds, the tables behind their calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from trueup.runs.statistics import accuracy_metrics, calibration_metrics, comparison_tables
from trueup.trainers.tally import Tally


class Summary(NamedTuple):
    """What an evaluation says."""

    figures: dict[str, float]
    tables: dict[str, Any] | None = None
    """A line of ``calibration.jsonl``."""


Summarise = Callable[[Tally], Summary]


def means(tally: Tally) -> Summary:
    """The loss and the mean of every metric."""
    return Summary(tally.means())


def compared_pairs(tally: Tally, accuracy: str, score_gap: str | None = None) -> Summary:
    """Means, and of pairs more: the metric ``accuracy`` of 0, ½ and 1 gets its 95 % interval and its length-matched
    form; ``score_gap``, whose σ is the model's probability of what people chose, gives calibration and its tables.
    """
    figures = tally.means()
    if accuracy not in figures:
        return Summary(figures)
    outcomes, lengths, lists = tally.all(accuracy).numpy(), tally.all("length_gap").numpy(), tally.lists()
    if np.isnan(outcomes).any():  # the model is broken: the means say so, and there is nothing to estimate
        return Summary(figures)
    figures |= accuracy_metrics(outcomes, lengths, lists, name=accuracy)
    if score_gap is None:
        return Summary(figures)
    gaps = tally.all(score_gap).numpy()
    tables = comparison_tables(gaps, lengths, lists) if np.isfinite(gaps).all() else None
    return Summary(figures | calibration_metrics(gaps, lists), tables)
