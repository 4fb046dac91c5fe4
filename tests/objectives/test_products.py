"""Types and sizes of products, on CPUs with and without instructions for half precision."""

from __future__ import annotations

import pytest
import torch

from trueup.objectives.products import cpu_multiplies, grid_padding, product_dtype

HALF, WIDE = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)


@pytest.fixture(params=[True, False])
def native(request, monkeypatch) -> bool:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": request.param}, raising=False)
    return request.param


def test_half_precision_is_multiplied_where_the_cpu_can(native: bool) -> None:
    assert cpu_multiplies(torch.bfloat16) is native
    assert not cpu_multiplies(torch.float16)
    assert product_dtype(HALF) == (torch.bfloat16 if native else torch.float32)
    assert product_dtype(HALF.half()) == torch.float32
    for dtype in (torch.float32, torch.float64):
        assert product_dtype(WIDE.to(dtype)) == dtype
    assert product_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16


def test_a_pytorch_that_can_t_say_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert product_dtype(HALF) == torch.float32


def test_sixteen_sizes_an_octave(native: bool) -> None:
    lengths = range(1, 5000)
    padded = [length + grid_padding(length, HALF) for length in lengths]
    if not native:
        assert padded == list(lengths)
        return
    assert all(0 <= size - length <= length / 16 for size, length in zip(padded, lengths, strict=True))
    for octave in (32, 64, 1024, 2048):
        assert len({size for size in padded if octave <= size < 2 * octave}) == 16
    assert padded[:32] == list(range(1, 33))


def test_what_is_not_compiled_for_a_size_is_not_padded(native: bool) -> None:
    assert grid_padding(1001, WIDE) == 0
    assert grid_padding(1001, HALF.to("meta")) == 0
