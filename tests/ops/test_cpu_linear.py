"""The packed matrix product: each instruction set against plain torch, over ragged sizes."""

from __future__ import annotations

import pytest
import torch

from mii.ops.linear import linear, linear_reference, pack_linear
from tests.ops.cpu_library import DTYPES, ISAS, assert_close, using

# (in_features, out_features): below, at and past the panel (16), the AMX depth (32) and the vector widths
SHAPES = ((1, 1), (31, 17), (32, 16), (33, 15), (64, 48), (100, 130), (192, 333), (576, 960))
ROWS = (0, 1, 2, 3, 4, 5, 8, 13, 16, 17, 31, 32, 33, 50, 64, 97, 130)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_linear_equals_reference(isa: str, dtype: torch.dtype, in_features: int, out_features: int) -> None:
    weight = (torch.randn(out_features, in_features + 2) * in_features**-0.5).to(dtype)[:, :in_features]
    bias = torch.randn(out_features).to(dtype)
    with using(isa):
        packed = pack_linear(weight)
        assert torch.equal(packed.unpacked(), weight)
        for rows in ROWS:
            x = torch.randn(rows, in_features + 7).to(dtype)[:, :in_features]
            for b in (None, bias):
                out = torch.full((rows, out_features + 3), torch.nan, dtype=dtype)
                expected = torch.empty(rows, out_features, dtype=dtype)
                linear(out[:, :out_features], x, packed, b)
                linear_reference(expected, x, packed, b)
                assert_close(out[:, :out_features], expected)
                assert out[:, out_features:].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_behind_a_row_of_x_is_not_read(isa: str, dtype: torch.dtype) -> None:
    """Rows padded with NaN: a kernel that reads past in_features and multiplies by the zero padding would show."""
    weight, buffer = torch.randn(20, 37).to(dtype), torch.full((19, 64), torch.nan, dtype=dtype)
    buffer[:, :37] = torch.randn(19, 37)
    with using(isa):
        packed = pack_linear(weight)
        for rows in (1, 4, 19):
            out = torch.empty(rows, 20, dtype=dtype)
            linear(out, buffer[:rows, :37], packed)
            assert out.isfinite().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed = pack_linear(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"must be \[rows, 8\] and \[rows, 4\]"):
        linear(torch.empty(2, 4), torch.randn(2, 9), packed)
    with pytest.raises(ValueError, match="dtype"):
        linear(torch.empty(2, 4), torch.randn(2, 8, dtype=torch.bfloat16), packed)
    with pytest.raises(ValueError, match="contiguous along a row"):
        pack_linear(torch.randn(8, 4).t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_features_beyond_a_cache_equal_reference(dtype: torch.dtype) -> None:
    """The blocked path: several passes over rows, spans of output features, blocks of input features, ragged ends."""
    for rows, in_features, out_features in ((700, 2050, 50), (130, 9000, 40), (1100, 1000, 1060)):
        weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
        bias, x = torch.randn(out_features).to(dtype), torch.randn(rows, in_features + 1).to(dtype)[:, :in_features]
        out = torch.full((rows, out_features + 3), torch.nan, dtype=dtype)
        expected = torch.empty(rows, out_features, dtype=dtype)
        packed = pack_linear(weight)
        linear(out[:, :out_features], x, packed, bias)
        linear_reference(expected, x, packed, bias)
        assert_close(out[:, :out_features], expected, scale=2)
        assert out[:, out_features:].isnan().all()
