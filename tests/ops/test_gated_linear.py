"""The product of gate and up with its activation, by the bodies that every machine has."""

from __future__ import annotations

import pytest
import torch

from mii.ops import linear_hopper
from mii.ops.activation import activation_reference
from mii.ops.linear import gated_linear, linear, pack_linear, pieces, rows_at_once


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_activation_of_the_product(dtype: torch.dtype, bias: bool) -> None:
    weight, x = torch.randn(2 * 40, 48).to(dtype), torch.randn(5, 48).to(dtype)
    offset = torch.randn(2 * 40).to(dtype) if bias else None
    out, scratch = torch.full((5, 40), torch.nan, dtype=dtype), torch.empty(5, 80, dtype=dtype)
    packed = pack_linear(weight)
    gated_linear(out, scratch, x, packed, "silu", offset, following=packed)
    both, expected = torch.empty_like(scratch), torch.empty_like(out)
    linear(both, x, packed, offset)
    activation_reference(expected, both, "silu", gated=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7])
def test_with_little_scratch_it_is_done_in_pieces(rows: int) -> None:
    weight, x = pack_linear(torch.randn(2 * 24, 32)), torch.randn(rows, 32)
    out, expected = torch.full((rows, 24), torch.nan), torch.empty(rows, 24)
    gated_linear(out, torch.empty(min(rows, 3), 48), x, weight, "gelu")
    gated_linear(expected, torch.empty(rows, 48), x, weight, "gelu")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("rows", "most", "sizes"), [(0, 4, []), (4, 4, [4]), (5, 4, [3, 2]), (9, 4, [3, 3, 3])])
def test_pieces_are_few_and_even(rows: int, most: int, sizes: list[int]) -> None:
    parts = list(pieces(rows, most))
    assert [part.stop - part.start for part in parts] == sizes
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))


@pytest.mark.parametrize(("rows", "on_a_gpu"), [(100, 100), (2048, 2048), (8192, 2048)])
def test_a_gpu_computes_mlps_in_pieces_and_a_cpu_whole(rows: int, on_a_gpu: int) -> None:
    assert rows_at_once(rows, torch.device("cpu")) == rows
    assert rows_at_once(rows, torch.device("cuda")) == on_a_gpu


def test_few_rows_stream_all_weights_where_memory_is_fast_and_the_narrow_ones_elsewhere() -> None:
    def kernels(fast_memory: bool) -> list[str | None]:
        cases = [(8, 4096), (9, 4096), (17, 4096), (8, 128256), (16, 128256)]
        cases += [(8, 28672), (16, 28672), (17, 28672), (64, 28672), (128, 28672), (129, 28672)]
        return [linear_hopper._kernel(rows, features, None, fast_memory) for rows, features in cases]

    wide, streamed = "mii_linear_wide", "mii_linear_streamed"
    assert kernels(fast_memory=False)[:5] == [streamed, None, None, wide, wide]
    assert kernels(fast_memory=False)[5:] == [wide, wide, wide, wide, wide, None]
    assert kernels(fast_memory=True)[:5] == [streamed, streamed, None, streamed, None]
    assert kernels(fast_memory=True)[5:] == [streamed, streamed, wide, wide, None, None]
    assert linear_hopper._kernel(64, 28672, "gelu", fast_memory=False) is None


def test_an_output_as_wide_as_the_product_is_refused() -> None:
    x, out = torch.zeros(2, 16), torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"out \(2, 32\).*\[rows, 16\]"):
        gated_linear(out, out, x, pack_linear(torch.zeros(32, 16)), "silu")


def test_what_does_not_begin_at_whole_16_bytes_is_not_fetched_ahead() -> None:
    table = torch.zeros(8, 36, dtype=torch.bfloat16)
    assert linear_hopper._ahead(table) == (table.data_ptr(), 576)
    assert linear_hopper._ahead(table[2:]) == (table.data_ptr() + 144, 432)
    assert linear_hopper._ahead(table[1:]) == linear_hopper._ahead(None) == (None, 0)
