"""Activations: the reference against transformers', the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from mii.ops import abi
from mii.ops import activation as activation_module
from mii.ops.activation import activation, activation_reference
from tests.ops.kernel_checks import DTYPES, assert_close, in_wider_rows, kernels_only, poisoned, shifted

NAMES = {  # our names and transformers'
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu_quick": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
WIDTHS = (1, 3, 8, 31, 96, 1536, 4104, 14336)
RUNS = (  # rows, gated, how the rows lie
    (0, True, "plain"),
    (1, True, "plain"),
    (1, False, "shifted"),
    (5, True, "strided"),
    (5, False, "plain"),
    (5, True, "shifted"),
    (70, False, "strided"),
    (70, True, "plain"),
)


@pytest.mark.parametrize("kind", NAMES)
def test_reference_equals_transformers(kind: str) -> None:
    x, bias = torch.randn(5, 24) * 4, torch.randn(24)
    plain, gated = torch.empty(5, 24), torch.empty(5, 12)
    activation_reference(plain, x, kind, gated=False, bias=bias)
    assert_close(plain, ACT2FN[NAMES[kind]](x + bias), ulps=4)
    activation_reference(gated, x, kind, gated=True)
    assert_close(gated, ACT2FN[NAMES[kind]](x[:, :12]) * x[:, 12:], ulps=4)


def test_a_soft_cap_bounds_what_it_leaves_in_order() -> None:
    x = torch.linspace(-200, 200, 41)[None]
    out = torch.empty_like(x)
    activation_reference(out, x, "softcap", gated=False, limit=30.0)
    assert_close(out, 30.0 * (x / 30.0).tanh())
    assert out.abs().max() <= 30.0
    assert (out.diff() >= 0).all()


def test_every_kind_has_a_reference_of_its_own() -> None:
    assert {*NAMES, "softcap"} == set(abi.ACTIVATIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "softcap", "limit": 0.0}, "not above 0"),
        ({"kind": "swish"}, "known ones are silu"),
        ({"out": torch.empty(4, 8)}, r"must be \[4, 16\]"),
        ({"x": torch.empty(8, 4).t()}, "contiguous along a row"),
        ({"bias": torch.empty(4)}, r"bias \(4,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    good = {"out": torch.empty(4, 4), "x": torch.zeros(4, 8), "kind": "silu", "gated": True}
    with pytest.raises(ValueError, match=message):
        activation(**{**good, **change})  # type: ignore[arg-type]


def _values(rows: int, width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal values and, in the first row, the far ends of the curve."""
    x = (torch.randn(rows, width, device=device) * 3).to(dtype)
    if rows:
        ends = torch.tensor([-120.0, -30.0, -9.0, 0.0, 9.0, 30.0, 120.0], device=device).to(dtype)
        x[0, : min(7, width)] = ends[:width]
    return x


def check_kernel(device: str, dtype: torch.dtype, kind: str, width: int) -> None:
    """One width against the reference: rows, gate, bias, strides, alignment."""
    for rows, gated, form in RUNS:
        wide = 2 * width if gated else width
        x, out = _values(rows, wide, dtype, device), poisoned(rows, width, dtype=dtype, device=device)
        bias = torch.randn(wide, device=device).to(dtype) if rows == 5 else None
        if form == "strided":
            x, out = in_wider_rows(x, 16), in_wider_rows(out, 8)
        elif form == "shifted":
            x = shifted(x)
        expected = torch.empty_like(out)
        with kernels_only(activation_module):
            activation(out, x, kind, gated=gated, bias=bias, limit=7.0)
        activation_reference(expected, x, kind, gated=gated, bias=bias, limit=7.0)
        assert_close(out, expected, ulps=1 if dtype != torch.float32 else 5)
        if form == "strided" and rows:
            assert out._base is not None
            assert out._base[:, width:].isnan().all()


@pytest.mark.parametrize("width", WIDTHS[:5])
@pytest.mark.parametrize("kind", abi.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(native_device: str, dtype: torch.dtype, kind: str, width: int) -> None:
    check_kernel(native_device, dtype, kind, width)
