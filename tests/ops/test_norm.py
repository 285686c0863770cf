"""Norms: the reference against torch's and transformers' modules, the kernels against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mii.ops import abi
from mii.ops import norm as norm_module
from mii.ops.norm import norm, norm_reference
from tests.ops.kernel_checks import (
    DTYPES,
    assert_close,
    assert_close_sums,
    in_wider_rows,
    kernels_only,
    poisoned,
    shifted,
)

KINDS = (abi.RMS, abi.RMS_PLUS1, abi.LAYER)
# Every way a row is held: lanes of a warp with 1, 2 and 4 packs, a CTA with 1, 2, 4 and 8, element by element.
WIDTHS = (1, 3, 8, 31, 64, 96, 250, 256, 576, 1000, 1001, 1024, 4096, 5120, 8200, 16384, 32768, 33000)
RUNS = (  # rows, with a residual, how the rows lie
    (0, True, "plain"),
    (1, False, "plain"),
    (1, True, "strided"),
    (5, False, "strided"),
    (5, True, "shifted"),
    (133, True, "plain"),
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_equals_llama(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(48, eps=1e-5)
    module.weight.data.normal_()
    module.to(dtype)
    x = torch.randn(7, 48).to(dtype)
    out = torch.empty_like(x)
    norm_reference(out, x, module.weight.data, eps=1e-5)
    assert torch.equal(out, module(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_plus1_equals_gemma(dtype: torch.dtype) -> None:
    module = GemmaRMSNorm(48, eps=1e-6)
    module.weight.data.normal_()
    module.to(dtype)
    x = torch.randn(7, 48).to(dtype)
    out = torch.empty_like(x)
    norm_reference(out, x, module.weight.data, eps=1e-6, kind=abi.RMS_PLUS1)
    assert torch.equal(out, module(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_equals_torch(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(7, 48).to(dtype) * 3 + 5, torch.randn(48).to(dtype), torch.randn(48).to(dtype)
    out = torch.empty_like(x)
    norm_reference(out, x, weight, eps=1e-5, bias=bias, kind=abi.LAYER)
    assert_close(out, torch.nn.functional.layer_norm(x, (48,), weight, bias, 1e-5), ulps=4)


def test_residual_is_updated_and_rounded_before_the_norm() -> None:
    x, residual = torch.randn(5, 32).bfloat16(), torch.randn(5, 32).bfloat16() * 100
    summed, out, expected = x + residual, torch.empty_like(x), torch.empty_like(x)
    norm_reference(out, x, None, eps=1e-5, residual=residual)
    norm_reference(expected, summed, None, eps=1e-5)
    assert torch.equal(residual, summed)
    assert torch.equal(out, expected)


def test_a_branch_is_normed_before_it_is_added() -> None:
    x, residual, inner = torch.randn(5, 32).bfloat16(), torch.randn(5, 32).bfloat16(), torch.randn(32).bfloat16()
    normed, out, expected = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    norm_reference(normed, x, inner, eps=1e-5)
    theirs = residual.clone()
    norm_reference(expected, normed, None, eps=1e-5, residual=theirs)
    norm_reference(out, x, None, eps=1e-5, residual=residual, x_weight=inner)
    assert torch.equal(residual, theirs)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": None}, "without an x_weight it needs an out"),
        ({"x_weight": torch.ones(8)}, "needs a residual"),
        ({"x_weight": torch.ones(8), "residual": torch.ones(4, 8), "kind": abi.LAYER}, "one of the kinds abi.RMS"),
        ({"x_weight": torch.ones(9), "residual": torch.ones(4, 8)}, r"x_weight \(9,\)"),
        ({"out": torch.empty(4, 9)}, "one shape and dtype"),
        ({"x": torch.empty(8, 4).t()}, "contiguous along a row"),
        ({"weight": torch.empty(9)}, r"weight \(9,\)"),
        ({"weight": torch.empty(8, dtype=torch.bfloat16)}, "of dtype torch.float32"),
        ({"bias": torch.empty(8)}, "only a LayerNorm"),
        ({"residual": torch.empty(4, 16)[:, :8]}, "contiguous and like x"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"out": torch.empty(4, 8), "x": torch.zeros(4, 8), "weight": torch.ones(8)}
    with pytest.raises(ValueError, match=message):
        norm(**{**good, **change}, eps=1e-5)


def check_kernel(device: str, dtype: torch.dtype, kind: int, width: int) -> None:
    """One width against the reference: rows, residual, weight, strides, alignment, in place."""
    weight = torch.randn(width, device=device).to(dtype)
    bias = torch.randn(width, device=device).to(dtype) if kind == abi.LAYER else None
    for rows, has_residual, form in RUNS[: 5 if width > 2000 else 6]:
        x = (torch.randn(rows, width, device=device) * 3 + 1).to(dtype)
        out, w, b = poisoned(rows, width, dtype=dtype, device=device), weight, bias
        if form == "strided":
            x, out, w, b = in_wider_rows(x, 16), in_wider_rows(out, 8), None, None
        elif form == "shifted":
            x, w = in_wider_rows(x, 5, 1), shifted(weight)
        expected = torch.empty_like(x)
        residual = (torch.randn(rows, width, device=device) * 3).to(dtype) if has_residual else None
        theirs = None if residual is None else residual.clone()
        with kernels_only(norm_module):
            norm(out, x, w, eps=1e-5, bias=b, residual=residual, kind=kind)
        norm_reference(expected, x, w, eps=1e-5, bias=b, residual=theirs, kind=kind)
        assert_close(out, expected, ulps=3 if dtype != torch.float32 else 10)
        if residual is not None and theirs is not None:
            assert torch.equal(residual, theirs)
        if form == "strided" and rows:
            assert out._base is not None
            assert out._base[:, width:].isnan().all()
    if kind != abi.LAYER:
        check_branch_norm(device, dtype, kind, width)
    in_place = torch.randn(3, width, device=device).to(dtype)
    expected = torch.empty_like(in_place)
    norm_reference(expected, in_place, weight, eps=1e-5, bias=bias, kind=kind)
    with kernels_only(norm_module):
        norm(in_place, in_place, weight, eps=1e-5, bias=bias, kind=kind)
    assert_close(in_place, expected, ulps=3 if dtype != torch.float32 else 10)


def check_branch_norm(device: str, dtype: torch.dtype, kind: int, width: int) -> None:
    """x normed before it is added: with and without a norm of the sum, plain and strided."""
    weight, inner = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    for rows, form in ((1, "plain"), (5, "strided"), (133 if width < 2000 else 3, "plain")):
        x = (torch.randn(rows, width, device=device) * 3 + 1).to(dtype)
        residual = (torch.randn(rows, width, device=device) * 3).to(dtype)
        x, w = (in_wider_rows(x, 5, 1), shifted(inner)) if form == "strided" else (x, inner)
        for outer in (True, False):
            out, expected = poisoned(rows, width, dtype=dtype, device=device), torch.zeros_like(residual)
            ours, theirs = residual.clone(), residual.clone()
            options: dict[str, Any] = {"eps": 1e-5, "kind": kind, "x_weight": w}
            with kernels_only(norm_module):
                norm(out if outer else None, x, weight if outer else None, residual=ours, **options)
            norm_reference(expected, x, weight, residual=theirs, **options)
            assert_close_sums(ours, theirs, residual, ulps=3 if dtype != torch.float32 else 20)
            if outer:
                assert_close(out, expected, ulps=6 if dtype != torch.float32 else 30)


@pytest.mark.parametrize("width", [width for width in WIDTHS if width <= 1024])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(native_device: str, dtype: torch.dtype, kind: int, width: int) -> None:
    check_kernel(native_device, dtype, kind, width)
