"""Two numbers in a config: how scores are read."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueup.errors import ModelError
from trueup.models.score_scale import ScoreScale

scales = st.builds(ScoreScale, score_mean=st.floats(-100, 100), score_std=st.floats(0.01, 100))


def test_by_hand():
    scale = ScoreScale(score_mean=3.0, score_std=2.0)
    assert scale(np.array([3.0, 5.0, 1.0])).tolist() == [0.0, 1.0, -1.0]
    assert scale(4.0) == 0.5


@given(scales, scales, st.floats(-100, 100))
def test_one_after_the_other(first, second, raw):
    assert first.then(second)(raw) == pytest.approx(second(first(raw)), rel=1e-9, abs=1e-6)


@given(scales)
def test_it_is_read_as_it_was_written(scale):
    assert ScoreScale.of(scale.fields() | {"vocab_size": 9}) == scale
    assert ScoreScale.of({name: repr(value) for name, value in scale.fields().items()}) == scale


@given(st.floats(allow_nan=False))
def test_nothing_changes_nothing_to_the_bit(raw):
    assert ScoreScale.of({})(raw) == raw


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (math.inf, 1.0), (0.0, math.inf)])
def test_what_is_no_scale_is_refused(mean, std):
    with pytest.raises(ModelError, match="standard deviation"):
        ScoreScale(score_mean=mean, score_std=std)
