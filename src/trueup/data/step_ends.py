"""Where the steps of an answer end, in the tokens of the whole answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trueup.data.encoder import Bounds, StepsNotFound


def joined_steps(steps: Sequence[str], separator: str) -> tuple[str, list[int]]:
    """The steps as one text, and where in it the first ends, the second begins, …, the last ends, without spaces."""
    text, bounds = "", []
    for step in steps:
        text += separator if bounds else ""
        start = len(text) + len(step) - len(step.lstrip())
        text += step
        bounds += [start, len(text.rstrip())]
    return text, bounds[1:]


def step_ends(bounds: Bounds) -> np.ndarray:
    """int64 [M]: the index of the last token of each step: the one that holds its last character, spaces left out.

    ``bounds``: what is counted at those of ``joined_steps``. Raises ``StepsNotFound`` where a token belongs to two
    steps: a score there would know of the next one.
    """
    ends = np.array([begun - 1 for begun, _ in bounds[::2]], dtype=np.int64)
    before_next = np.array([ended for _, ended in bounds[1::2]], dtype=np.int64)
    if (ends[:-1] >= before_next).any() or (np.diff(ends, prepend=-1) < 1).any():
        raise StepsNotFound("one token holds the end of a step and the start of the next")
    return ends
