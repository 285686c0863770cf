"""The product of a few rows on a card, against torch in float64."""

from __future__ import annotations

import pytest
import torch

from mii.ops import linear as module
from mii.ops.linear import linear, pack_linear

# Row tiles and steps of k that are whole, cut off, fewer than the card has multiprocessors, and many for each.
SHAPES = [
    (128, 64),
    (8, 8),
    (576, 576),
    (960, 576),
    (3072, 576),
    (6144, 4096),
    (4096, 14336),
    (200, 1000),
    (49152, 576),
]


@pytest.fixture(autouse=True)
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAMED_ROWS", 64)


def product(
    rows: int, n: int, k: int, dtype: torch.dtype, bias: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    x, weight, offset = random(rows, k), random(n, k), random(n) if bias else None
    out = torch.full((rows, n), float("nan"), device="cuda", dtype=dtype)
    linear(out, x, pack_linear(weight), offset)
    expected = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    return out, expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 32, 33, 64])
def test_kernel_equals_torch(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_linear_torch", lambda *a: pytest.fail("the kernel did not take it"))
    for seed in range(3):  # the counters reset themselves
        out, expected = product(rows, *shape, dtype, bias=rows % 2 == 0, seed=seed)
        error = (out.double() - expected).norm() / expected.norm()
        assert error < 2 * torch.finfo(dtype).eps


def test_runs_repeat_bit_for_bit() -> None:
    first, _ = product(5, 4096, 14336, torch.bfloat16, bias=False)
    assert all(torch.equal(product(5, 4096, 14336, torch.bfloat16, bias=False)[0], first) for _ in range(10))


def test_rows_may_be_strided() -> None:
    wide = torch.randn(12, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(12, 1536, device="cuda", dtype=torch.bfloat16)
    linear(out[:, 512:1024], wide[:, 1024:], pack_linear(weight))
    expected = wide[:, 1024:].double() @ weight.double().t()
    assert (out[:, 512:1024].double() - expected).norm() / expected.norm() < 0.01
    assert not out[:, :512].any()
    assert not out[:, 1024:].any()


def test_a_chain_of_products_in_a_graph_equals_the_launched_one() -> None:
    weights = [pack_linear(torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) / 45) for _ in range(6)]
    buffers = [torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16)] + [
        torch.zeros(4, 2048, device="cuda", dtype=torch.bfloat16) for _ in weights
    ]

    def chain() -> None:
        for source, target, weight in zip(buffers, buffers[1:], weights, strict=False):
            linear(target, source, weight)

    chain()
    torch.cuda.synchronize()
    expected = buffers[-1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(20):
        buffers[-1].zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(buffers[-1], expected)
