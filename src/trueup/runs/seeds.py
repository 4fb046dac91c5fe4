"""Random states: set from one seed, saved and restored without pickle."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (CPU and every CUDA device).

    ``seed`` is a non-negative integer; NumPy's global generator takes its lowest 32 bits.
    Raises ``ValueError`` for a negative seed.
    """
    if seed < 0:
        raise ValueError("the seed must not be negative")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries below us draw from the global generator)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of the generators that ``seed_everything`` seeds, as tensors and plain values only.

    What is drawn after ``restore_rng_state(rng_state())`` is what would have been drawn without it, to the bit.
    """
    name, key, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    assert name == "MT19937"
    version, words, gauss_next = random.getstate()
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss_next],
        "numpy": [torch.from_numpy(np.asarray(key).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Set the generators to what ``rng_state`` returned.

    CUDA devices are matched by number; states of devices that this machine lacks are left out, and a device without a
    saved state keeps its own.
    """
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))
    key, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(device_state, device)
