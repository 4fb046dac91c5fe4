from __future__ import annotations

import pytest
import torch

from trueup.errors import OutOfMemoryError
from trueup.runs.memory import is_out_of_memory


def test_what_pytorch_raises_on_the_cpu_is_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert type(raised.value) is RuntimeError
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (OutOfMemoryError("out of memory"), False),
    ],
)
def test_others(error, expected):
    assert is_out_of_memory(error) is expected
