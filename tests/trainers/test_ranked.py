"""Rows, masks and the pairs of a ranking, by hand."""

from __future__ import annotations

import numpy as np
import torch

from trueup.records import Completion, CompletionGroup
from trueup.trainers.ranked import ordered_pairs, outcomes, ranked_mask, ranked_rows
from trueup.trainers.tally import Tally, Totals


def group(*lengths: int, mask: np.ndarray | None = None) -> CompletionGroup:
    completions = tuple(Completion(tokens=np.zeros(n, dtype=np.int64), mask=mask) for n in lengths)
    return CompletionGroup(prompt=np.zeros(1, dtype=np.int64), completions=completions)


def test_rows_pairs_and_outcomes():
    groups = [group(1, 1, 1), group(1, 1)]
    rows = ranked_rows(torch.tensor([5.0, 7.0, 6.0, 2.0, 2.0]), groups)
    mask = ranked_mask(groups, torch.device("cpu"))
    assert rows.tolist() == [[5, 7, 6], [2, 2, 0]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    better, worse = ordered_pairs(rows, mask)
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(5, 7), (5, 6), (7, 6), (2, 2)]
    assert outcomes(better, worse).tolist() == [0, 0, 1, 0.5]


def test_totals_count_scored_tokens_only():
    masked = group(3, mask=np.array([True, False, True]))
    assert Totals.of([group(2, 4), masked]) == Totals(groups=2, completions=3, tokens=8)


def test_tally_adds_shares_and_averages_values():
    tally = Tally()
    tally.add(torch.tensor(0.25), {"margin": torch.tensor([1.0, 2.0])}, tokens=3)
    tally.add(torch.tensor(0.5), {"margin": torch.tensor([6.0])}, tokens=4)
    assert tally.means() == {"loss": 0.75, "margin": 3.0}
    assert tally.tokens == 7
