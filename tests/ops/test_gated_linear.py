"""The product of gate and up with its activation, by the bodies that every machine has."""

from __future__ import annotations

import pytest
import torch

from mii.ops.activation import activation_reference
from mii.ops.linear import gated_linear, linear, pack_linear


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


def test_an_output_as_wide_as_the_product_is_refused() -> None:
    x, out = torch.zeros(2, 16), torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"out \(2, 32\).*\[rows, 16\]"):
        gated_linear(out, out, x, pack_linear(torch.zeros(32, 16)), "silu")
