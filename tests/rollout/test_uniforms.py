"""The random numbers: known answers of the generator, uniform, and independent along everything that keys them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trueup.rollout.uniforms import philox, uniforms

KNOWN = [  # counter, key, output: as published with the generator
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
AXES = ("seed", "request", "completion", "position")


def along(axis: str, count: int, start: int = 0) -> np.ndarray:
    """Numbers that differ in one key only."""
    counting = np.arange(start, start + count)
    if axis == "seed":
        return np.array([float(uniforms(seed, np.int64(5), np.int64(3), np.int64(7))) for seed in counting.tolist()])
    keys = {"request": np.int64(5), "completion": np.int64(3), "position": np.int64(7)} | {axis: counting}
    return uniforms(11, keys["request"], keys["completion"], keys["position"])


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter, key, output) -> None:
    found = philox(np.array(counter, dtype=np.uint32)[:, None], np.array(key, dtype=np.uint32))
    assert found.dtype == np.uint32
    assert found[:, 0].tolist() == output


@pytest.mark.parametrize("axis", AXES)
def test_uniform_and_independent_of_the_neighbour(axis) -> None:
    numbers = along(axis, 4096 if axis == "seed" else 1 << 17)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.chisquare(np.histogram(numbers, 64, (0, 1))[0]).pvalue > 1e-3
    pairs = np.histogram2d(numbers[0::2], numbers[1::2], 8, ((0, 1), (0, 1)))[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / len(numbers) ** 0.5


@pytest.mark.parametrize(("first", "second"), [("request", "completion"), ("completion", "position")])
def test_two_keys_do_not_stand_for_each_other(first, second) -> None:
    here, there = along(first, 1000), along(second, 1000)
    assert len(np.intersect1d(here, there)) <= 1  # where both keys are what they are in the other


def test_all_53_bits_are_random() -> None:
    bits = (uniforms(1, np.arange(20000), np.int64(0), np.int64(0)) * 2.0**53).astype(np.int64)
    for bit in range(53):
        assert abs((bits >> bit & 1).mean() - 0.5) < 4 * 0.5 / 20000**0.5, bit


def test_large_and_negative_keys_are_told_apart() -> None:
    requests = np.array([0, 1 << 32, 1 << 40, -1, (1 << 62) + 1])
    assert len(np.unique(uniforms(0, requests, np.int64(0), np.int64(0)))) == 5
    seeds = [float(uniforms(seed, np.int64(0), np.int64(0), np.int64(0))) for seed in (0, 1 << 32, 1 << 63, -1)]
    assert len(set(seeds)) == 4


def test_shapes_broadcast() -> None:
    grid = uniforms(3, np.arange(4)[:, None], np.int64(2), np.arange(6))
    assert grid.shape == (4, 6)
    assert grid[2, 5] == uniforms(3, np.int64(2), np.int64(2), np.int64(5))
