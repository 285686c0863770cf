"""The product of gate and up with its activation, by the bodies that every machine has."""

from __future__ import annotations

import pytest
import torch

from mii.ops import linear_hopper
from mii.ops.activation import activation_reference
from mii.ops.linear import gated_linear, linear, pack_linear, scratch_rows


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


def test_where_no_kernel_does_all_at_once_scratch_has_a_row_for_each() -> None:
    assert scratch_rows(8192, 28672, "silu", torch.bfloat16, torch.device("cpu")) == 8192


@pytest.mark.parametrize("features", [512, 2 * 8960, 28672, 57344])
@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_every_product_of_more_rows_than_scratch_has_is_a_hopper_kernels(features: int, kind: str) -> None:
    most = linear_hopper.most_rows_without(8192, features, kind, 132)
    kernels = [linear_hopper._kernel(rows, features, kind, 132) for rows in range(1, 8193)]
    assert all(kernels[most:])
    assert most == 0 or kernels[most - 1] is None
    assert most == 8192 if kind == "gelu" else most < 8192


def test_rows_that_share_tiles_have_a_kernel_whatever_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_hopper, "SHARED_ROWS", range(100, 1024))
    chosen = {
        (rows, features, kind): linear_hopper._kernel(rows, features, kind, 132)
        for rows in (8, 99, 100, 128, 129, 1023, 1024)
        for features in (512, 28672)
        for kind in (None, "silu", "gelu")
    }
    shared = {case for case, kernel in chosen.items() if kernel == "mii_linear_shared"}
    assert shared == {
        (rows, features, kind)
        for rows in (100, 128, 129, 1023)
        for features in (512, 28672)
        for kind in (None, "silu")
        if rows > 128 or features == 512
    }
    assert linear_hopper.most_rows_without(1023, 28672, "silu", 132) == 0


def test_an_output_as_wide_as_the_product_is_refused() -> None:
    x, out = torch.zeros(2, 16), torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"out \(2, 32\).*\[rows, 16\]"):
        gated_linear(out, out, x, pack_linear(torch.zeros(32, 16)), "silu")


def test_what_does_not_begin_at_whole_16_bytes_is_not_fetched_ahead() -> None:
    table = torch.zeros(8, 36, dtype=torch.bfloat16)
    assert linear_hopper._ahead(table) == (table.data_ptr(), 576)
    assert linear_hopper._ahead(table[2:]) == (table.data_ptr() + 144, 432)
    assert linear_hopper._ahead(table[1:]) == linear_hopper._ahead(None) == (None, 0)
