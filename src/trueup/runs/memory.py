"""Recognising that memory ran out, whoever says so. Free of torch."""

from __future__ import annotations

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, a device's, or PyTorch's on the CPU (a plain ``RuntimeError``)."""
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one too
        return any(sign in str(error).lower() for sign in _SIGNS)
    return isinstance(error, MemoryError)
