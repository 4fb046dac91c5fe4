"""Aggregates of several models' scores, by hand and by what must hold of any scores."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trueup.cli.score import ScoreSettings
from trueup.rewards.ensembles import (
    AGGREGATES,
    ensemble_mean,
    ensemble_std,
    mean_minus_std,
    mean_minus_variance,
    worst_case,
)

SCORES = [[1.0, 4.0], [3.0, 4.0], [8.0, 4.0]]
some_scores = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-50, 50))


def test_by_hand():
    """Models say 1, 3, 8 of the first answer: mean 4, variance (9 + 1 + 16)/3; they agree on the second."""
    std = math.sqrt(26 / 3)
    assert ensemble_mean(SCORES).tolist() == [4.0, 4.0]
    assert ensemble_std(SCORES) == pytest.approx([std, 0.0])
    assert worst_case(SCORES).tolist() == [1.0, 4.0]
    assert mean_minus_std(SCORES, 0.5) == pytest.approx([4 - std / 2, 4.0])
    assert mean_minus_variance(SCORES, 0.5) == pytest.approx([4 - 13 / 3, 4.0])


@given(some_scores, st.floats(0, 3))
def test_one_model_is_itself_and_many_never_beat_their_mean(scores, coef):
    for name, aggregate in AGGREGATES.items():
        assert aggregate(scores[:1], coef) == pytest.approx(scores[0]), name
        assert (aggregate(scores, coef) <= ensemble_mean(scores) + 1e-9).all(), name


@given(some_scores, st.floats(-20, 20), st.randoms(use_true_random=False))
def test_a_common_shift_shifts_and_the_order_of_models_does_not_matter(scores, shift, random):
    order = random.sample(range(len(scores)), len(scores))
    for name, aggregate in AGGREGATES.items():
        assert aggregate(scores + shift, 1.5) == pytest.approx(aggregate(scores, 1.5) + shift, abs=1e-6), name
        assert aggregate(scores[order], 1.5) == pytest.approx(aggregate(scores, 1.5), abs=1e-9), name


@given(some_scores)
def test_the_worst_model_is_within_reach_of_the_spread(scores):
    """min ≥ mean − √(M − 1) · std for any M numbers (Samuelson): the charge can be as strict as the worst case."""
    bound = mean_minus_std(scores, math.sqrt(len(scores) - 1))
    assert (worst_case(scores) >= bound - 1e-6).all()


def test_the_lowest_zero_wins_unless_scores_are_on_one_scale():
    """Why the docs ask for normalisation first: a model that is merely shifted down decides alone."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 100))
    shifted = scores - np.array([[0], [0], [10]])
    assert (worst_case(shifted) == shifted[2]).all()
    assert len(np.unique(np.argmin(shifted - shifted.mean(1, keepdims=True), 0))) == 3


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[[1.0]]], np.empty((0, 3))])
def test_what_is_not_models_by_completions_is_refused(bad):
    for aggregate in (ensemble_mean, ensemble_std, worst_case, mean_minus_std, mean_minus_variance):
        with pytest.raises(ValueError, match=r"\[models, completions\]"):
            aggregate(bad)


def test_the_table_of_aggregates_is_the_setting():
    assert set(AGGREGATES) == set(get_args(get_type_hints(ScoreSettings)["aggregate"]))
