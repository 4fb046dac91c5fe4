"""Keeping freed memory in the process."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_LARGEST = 2**30


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks of up to 1 GiB for reuse instead of handing them back to the system.

    Every training step frees large buffers and asks for them again; from the system each comes as fresh pages that
    have to be zeroed and mapped, which can cost a third of a step on the CPU. The price is that memory stays at its
    peak, which is a choice for the process's owner: the command line makes it, ``import trueup`` never does.

    ``TRUEUP_KEEP_MEMORY=0`` in the environment leaves the allocator as it is; so do other C libraries and systems.
    Returns whether it was done.
    """
    if os.environ.get("TRUEUP_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, _LARGEST))
