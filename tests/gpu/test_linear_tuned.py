"""Products by cuBLASLt with a timed algorithm, against torch in float64."""

from __future__ import annotations

import pytest
import torch

from mii.ops import linear_tuned
from mii.ops.linear import linear, pack_linear


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_tuned, "TUNED", True)
    monkeypatch.setattr(linear_tuned, "_products", {})


def error(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    expected = x.double() @ weight.double().t()
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 65, 200, 512, 1024])
def test_tuned_product_equals_torch(rows: int, dtype: torch.dtype) -> None:
    for n, k in ((6144, 1024), (576, 1536), (49152, 576)):
        x, weight = (torch.randn(size, k, device="cuda").to(dtype) for size in (rows, n))
        out = torch.full((rows, n), float("nan"), device="cuda", dtype=dtype)
        linear(out, x, pack_linear(weight))
        assert error(out, x, weight) < 2 * torch.finfo(dtype).eps
    assert len(linear_tuned._products) == 3 and all(linear_tuned._products.values())


def test_columns_of_a_wider_matrix() -> None:
    wide = torch.randn(80, 3072, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(80, 1536, device="cuda", dtype=torch.bfloat16)
    linear(out[:, 512:1024], wide[:, 1024:2048], pack_linear(weight))
    assert error(out[:, 512:1024], wide[:, 1024:2048], weight) < 0.01
    assert all(linear_tuned._products.values())
    assert not out[:, :512].any()
    assert not out[:, 1024:].any()


def test_a_captured_product_takes_what_was_chosen_before() -> None:
    weight = pack_linear(torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16))
    known, unknown = (torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16) for rows in (96, 160))
    outs = [x.new_zeros(len(x), 1024) for x in (known, unknown)]
    linear(outs[0], known, weight)
    torch.mm(unknown, weight.data.t(), out=outs[1])  # torch's own product has to be ready for a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out, x in zip(outs, (known, unknown), strict=True):
            linear(out, x, weight)
    assert [shape.rows for shape in linear_tuned._products] == [96]
    for out in outs:
        out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(error(out, x, weight.data) < 0.01 for out, x in zip(outs, (known, unknown), strict=True))
