from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch

from trueup.runs.seeds import restore_rng_state, rng_state, seed_everything


def draw() -> tuple:
    """From every generator, with an odd number of normals, so that a cached second normal is part of the state."""
    return (
        random.random(),
        random.gauss(0, 1),
        random.sample(range(100), 5),
        np.random.standard_normal(3).tolist(),  # noqa: NPY002
        np.random.randint(1 << 30),  # noqa: NPY002
        torch.randn(3).tolist(),
        torch.randperm(10).tolist(),
    )


def test_one_seed_sets_all_generators():
    seed_everything(2**40 + 3)
    first = draw()
    seed_everything(2**40 + 3)
    assert draw() == first
    seed_everything(2**40 + 4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_the_state_survives_a_file_without_pickle_to_the_bit():
    seed_everything(5)
    draw()
    buffer = io.BytesIO()
    torch.save(rng_state(), buffer)
    expected = [draw() for _ in range(3)]
    seed_everything(6)
    buffer.seek(0)
    restore_rng_state(torch.load(buffer, weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_reading_the_state_draws_nothing():
    seed_everything(5)
    expected = draw()
    seed_everything(5)
    rng_state()
    assert draw() == expected


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="negative"):
        seed_everything(-1)
