"""Products that are left as parts of their sum, and what adds them up."""

from __future__ import annotations

import pytest
import torch

from mii.ops import abi, linear_hopper
from mii.ops.linear import linear, pack_linear
from mii.ops.norm import norm
from mii.ops.summands import Summands


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [abi.RMS, abi.RMS_PLUS1, abi.LAYER])
def test_a_norm_adds_them_up_and_rounds_once(kind: int, dtype: torch.dtype) -> None:
    left = Summands(torch.randn(3, 5, 64), dtype)
    whole = (left.parts[0] + left.parts[1] + left.parts[2]).to(dtype)
    assert torch.equal(left.total(), whole)
    residual, weight = torch.randn(5, 64).to(dtype), torch.randn(64).to(dtype)
    of_parts, of_whole = residual.clone(), residual.clone()
    out, expected = torch.full((5, 64), torch.nan, dtype=dtype), torch.empty(5, 64, dtype=dtype)
    norm(out, left, weight, eps=1e-5, residual=of_parts, kind=kind)
    norm(expected, whole, weight, eps=1e-5, residual=of_whole, kind=kind)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(of_parts, of_whole)


def test_a_tokens_experts_give_a_row_each() -> None:
    rows = torch.randn(6, 64).bfloat16()  # three of each of two tokens
    left = Summands(rows.view(2, 3, 64).transpose(0, 1), torch.bfloat16)
    assert torch.equal(left.total(), rows.float().view(2, 3, 64).sum(1).bfloat16())
    residual, out, expected = (
        torch.zeros(2, 64).bfloat16(),
        torch.empty(2, 64).bfloat16(),
        torch.empty(2, 64).bfloat16(),
    )
    norm(out, left, None, eps=1e-5, residual=residual)
    norm(expected, left.total(), None, eps=1e-5)
    torch.testing.assert_close(out, expected)


def test_parts_of_another_shape_or_dtype_and_without_a_residual_are_refused() -> None:
    out, residual = torch.empty(5, 64), torch.zeros(5, 64)
    with pytest.raises(ValueError, match=r"parts \(3, 4, 64\).*\(5, 64\)"):
        norm(out, Summands(torch.zeros(3, 4, 64), torch.float32), None, eps=1e-5, residual=residual)
    with pytest.raises(ValueError, match=r"parts .* of torch\.bfloat16 .* torch\.float32"):
        norm(out, Summands(torch.zeros(3, 5, 64), torch.bfloat16), None, eps=1e-5, residual=residual)
    with pytest.raises(ValueError, match="needs a residual"):
        norm(out, Summands(torch.zeros(3, 5, 64), torch.float32), None, eps=1e-5)


@pytest.mark.parametrize(
    ("features", "in_features", "parts"),
    [
        (4096, 4096, 4),  # output and down of an 8B Llama
        (4096, 14336, 4),
        (3584, 18944, 4),
        (8192, 28672, 2),
        (2048, 2048, 8),
        (2048, 448, 7),  # no part without a step of k
        (2048, 256, 0),
        (6144, 4096, 0),  # two of 48 tiles would leave a quarter of the card idle
        (28672, 4096, 0),  # tiles enough
        (1024, 1024, 0),  # too few, even in eight parts
    ],
)
def test_a_product_is_left_in_as_many_parts_as_keep_the_card_reading(
    features: int, in_features: int, parts: int
) -> None:
    count = linear_hopper.num_parts(features, in_features, 132)
    assert count == parts
    assert -(-features // 128) * count <= 132


def test_what_is_no_gpus_is_made_whole() -> None:
    weight, x, out = pack_linear(torch.randn(24, 16)), torch.randn(20, 16), torch.full((20, 24), torch.nan)
    assert linear_hopper.parts_size(x.device) == 0
    assert linear(out, x, weight, summands=torch.empty(1 << 12)) is out
    assert not out.isnan().any()
    assert linear_hopper.parts(torch.empty(1 << 12), x, torch.randn(24, 16).bfloat16(), None) is None
