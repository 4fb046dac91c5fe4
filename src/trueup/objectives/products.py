"""In which type and in which sizes a device multiplies matrices well."""

from __future__ import annotations

import torch
from torch import Tensor

_INSTRUCTIONS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16"),
}
"""What PyTorch calls a CPU's instructions for products of a type."""


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of this half-precision type; without them float32 is faster."""
    has = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch before 2.12 can't say
    return any(has.get(feature) for feature in _INSTRUCTIONS[dtype])


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which to multiply ``x``: its own, or float32 on a CPU that is faster in it."""
    if x.device.type != "cpu" or x.dtype not in _INSTRUCTIONS or cpu_multiplies(x.dtype):
        return x.dtype
    return torch.float32


def grid_padding(length: int, like: Tensor) -> int:
    """How many rows to add to ``length`` so that products of ``like``'s kind come in few sizes; at most a sixteenth.

    A CPU's half-precision products are compiled for each size when it first comes (oneDNN), which takes as long as
    several products of a training step, and only so many sizes are remembered. On a grid of 16 sizes an octave they
    all are. 0 for what is not compiled.
    """
    compiled = like.device.type == "cpu" and like.dtype in _INSTRUCTIONS and cpu_multiplies(like.dtype)
    return -length % max(1, 1 << (length.bit_length() - 5)) if compiled and length > 16 else 0
