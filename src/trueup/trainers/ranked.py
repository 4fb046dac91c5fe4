"""Per-completion numbers laid out as one row per prompt, and the pairs that a ranking implies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trueup.errors import DataError
from trueup.records import CompletionGroup


def check_ranked(group: CompletionGroup) -> None:
    """Raise ``DataError`` for a group without two completions to compare."""
    if group.desirable is not None:
        raise DataError(
            "a completion with a label, and nothing to compare it with",
            where=group.where or None,
            way_out="--loss kto, bco, apo_zero, nca or sppo take such data",
        )
    if len(group.completions) < 2:
        raise DataError("a preference needs two completions", where=group.where or None)


def ranked_rows(values: Tensor, groups: Sequence[CompletionGroup]) -> Tensor:
    """``values[C]`` in the order of the completions → ``[N, K]``, best first; shorter groups are filled with 0."""
    return pad_sequence(list(values.split([len(group.completions) for group in groups])), batch_first=True)


def ranked_mask(groups: Sequence[CompletionGroup], device: torch.device) -> Tensor:
    """bool ``[N, K]``: where a row of ``ranked_rows`` holds a completion."""
    sizes = torch.tensor([len(group.completions) for group in groups], device=device)
    return torch.arange(int(sizes.max()), device=device) < sizes[:, None]


def ordered_pairs(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The values of (better, worse) for every pair that the ranking of each row implies; K = 2 gives one pair a row."""
    better, worse = torch.triu_indices(rows.shape[1], rows.shape[1], offset=1, device=rows.device)
    both = mask[:, better] & mask[:, worse]
    return rows[:, better][both], rows[:, worse][both]


def outcomes(better: Tensor, worse: Tensor) -> Tensor:
    """1 where the better one has the higher value, 0 where it has the lower, ½ at a tie, NaN where one is NaN."""
    lead = better - worse
    return torch.where(lead.isnan(), lead, 0.5 * (1.0 + torch.sign(lead)))
