"""Which completion is better than which, held against the definitions spelled out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueup.rollout.pairs import PAIRS, all_pairs, best_and_worst, distinct, ranking

# few different values, so that ties come up; exact in binary, so that gaps are too
SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]), min_size=0, max_size=6)
GAPS = st.sampled_from([0.0, 0.25, 0.5, 1.5])


@given(SCORES, GAPS)
def test_all_pairs_are_all_that_are_far_enough_apart(scores, gap):
    wanted = {
        (i, j)
        for i, j in itertools.permutations(range(len(scores)), 2)
        if scores[i] > scores[j] and scores[i] - scores[j] >= gap
    }
    found = all_pairs(np.array(scores), gap)
    assert len(found) == len(wanted)
    assert set(found) == wanted


@given(SCORES)
def test_ties_come_in_both_orders(scores):
    found = all_pairs(np.array(scores), 0.0, True)
    assert sorted(found) == sorted(
        (i, j) for i, j in itertools.permutations(range(len(scores)), 2) if scores[i] >= scores[j]
    )


@given(SCORES, GAPS)
def test_best_and_worst(scores, gap):
    found = best_and_worst(np.array(scores), gap)
    if len(scores) < 2 or max(scores) == min(scores) or max(scores) - min(scores) < gap:
        assert found == []
    else:
        assert found == [(scores.index(max(scores)), scores.index(min(scores)))]
        assert found[0] in all_pairs(np.array(scores), gap)


@given(SCORES, GAPS)
def test_a_ranking_descends_by_the_gap_and_leaves_out_no_more_than_it_must(scores, gap):
    order = ranking(np.array(scores), gap)
    values = [scores[index] for index in order]
    assert all(a > b and a - b >= gap for a, b in itertools.pairwise(values))
    for index in set(range(len(scores))) - set(order):  # each one left out is too near to one above it
        above = [value for value in values if value >= scores[index]]
        assert above[-1] == scores[index] or above[-1] - scores[index] < gap
    assert order[:1] == ([scores.index(max(scores))] if scores else [])


def test_by_hand():
    scores = np.array([0.5, 2.0, 0.5, 0.0])
    assert best_and_worst(scores) == [(1, 3)]
    assert best_and_worst(scores, 2.5) == []
    assert all_pairs(scores) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]
    assert all_pairs(scores, 1.0) == [(1, 0), (1, 2), (1, 3)]
    assert all_pairs(scores, keep_ties=True)[5:] == [(0, 2), (2, 0)]
    assert ranking(scores) == [1, 0, 3]
    assert ranking(scores, 1.0) == [1, 0]
    assert ranking(scores, 1.6) == [1, 3]


def test_where_all_are_equal_best_and_worst_are_the_first_and_the_last():
    assert best_and_worst(np.array([1.0, 1.0, 1.0])) == []
    assert best_and_worst(np.array([1.0, 1.0, 1.0]), keep_ties=True) == [(0, 2), (2, 0)]


@pytest.mark.parametrize("make", PAIRS.values())
def test_one_completion_is_no_pair(make):
    assert make(np.array([1.0]), 0.0, True) == []
    assert make(np.array([]), 0.0, True) == []


def test_distinct_keeps_the_first():
    assert distinct(["a", "b", "a", "c", "b"]) == [0, 1, 3]
    assert distinct([({"content": "a"},), ({"content": "a"},)]) == [0]
