"""The product of a few rows on a card, against torch in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from mii.ops import linear as module
from mii.ops import linear_hopper
from mii.ops.activation import activation
from mii.ops.linear import LinearWeight, gated_linear, linear, pack_linear, rows_at_once
from mii.ops.norm import norm

# Tiles and steps of k that are whole, cut off, fewer than the card has multiprocessors, and many for each.
SHAPES = [
    (128, 64),
    (8, 16),
    (576, 576),
    (960, 576),
    (3072, 576),
    (6144, 4096),
    (4096, 14336),
    (200, 1008),
    (49152, 576),
]
DTYPES = [torch.bfloat16, torch.float16]
TORCH = module._linear_torch


@pytest.fixture(autouse=True)
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of as many rows as they take, whether or not this card's memory is fast."""
    monkeypatch.setattr(module, "_linear_torch", lambda *a: pytest.fail("the kernel did not take it"))
    monkeypatch.setattr(linear_hopper, "STREAMED_ROWS", 16)


@pytest.fixture
def on_any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warpgroup products of every number of rows that they take, whether or not this card's memory is fast."""
    monkeypatch.setattr(linear_hopper, "FAST_WIDE_ROWS", linear_hopper.WIDE_ROWS)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").mul_(scale).to(dtype)


def product(
    rows: int, n: int, k: int, dtype: torch.dtype, bias: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = random(rows, k, dtype=dtype, seed=seed), random(n, k, dtype=dtype, seed=seed + 1)
    offset = random(n, dtype=dtype, seed=seed + 2) if bias else None
    out = torch.full((rows, n), float("nan"), device="cuda", dtype=dtype)
    linear(out, x, pack_linear(weight), offset)
    expected = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    return out, expected


def assert_near(out: torch.Tensor, expected: torch.Tensor, eps: float = 2.0) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < eps * torch.finfo(out.dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 13, 16])
def test_kernel_equals_torch(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(3):  # the counters reset themselves
        out, expected = product(rows, *shape, dtype, bias=rows % 2 == 0, seed=seed)
        assert_near(out, expected)


BODIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 32), (100, 576), (1536, 576), (14336, 4096)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 8, 13, 16])
def test_gated_product_equals_torch(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    width, k = shape
    x, weight = random(rows, k, dtype=dtype), random(2 * width, k, dtype=dtype, seed=1, scale=k**-0.5)
    bias = random(2 * width, dtype=dtype, seed=2) if rows % 2 else None
    both = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    gate, up = both.chunk(2, dim=1)
    for kind, body in BODIES.items():
        out = torch.full((rows, width), float("nan"), device="cuda", dtype=dtype)
        gated_linear(out, out.new_empty(rows, 2 * width), x, pack_linear(weight), kind, bias)
        assert_near(out, body(gate) * up, eps=4)


def check_gated(rows: int, shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    width, k = shape
    x, weight = random(rows, k, dtype=dtype), random(2 * width, k, dtype=dtype, seed=1, scale=k**-0.5)
    bias = random(2 * width, dtype=dtype, seed=2) if rows % 2 else None
    both = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    expected = torch.empty(rows, width, dtype=dtype, device="cuda")
    activation(expected, both.to(dtype), kind, gated=True)
    out = torch.full((rows, width), float("nan"), device="cuda", dtype=dtype)
    gated_linear(out, out.new_empty(rows, 2 * width), x, pack_linear(weight), kind, bias)
    assert_near(out, expected.double(), eps=4)


# By warpgroup products: tiles and steps of k that are whole and cut off.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(12288, 64), (12300, 1000), (28672, 4096)], ids=str)
@pytest.mark.parametrize("rows", [9, 16, 64, 65, 128])
@pytest.mark.usefixtures("on_any_memory")
def test_wide_product_equals_torch(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(2):
        out, expected = product(rows, *shape, dtype, bias=rows % 2 == 0, seed=seed)
        assert_near(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", linear_hopper.GATES)
@pytest.mark.parametrize("shape", [(6144, 64), (6150, 1000), (14336, 4096)], ids=str)
@pytest.mark.parametrize("rows", [9, 64, 100, 128])
@pytest.mark.usefixtures("on_any_memory")
def test_wide_gated_product_equals_torch(rows: int, shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    check_gated(rows, shape, kind, dtype)


@pytest.mark.parametrize("rows", [1, 8, 200, 2048, 2049, 8192])
def test_an_engines_scratch_is_enough_for_every_gated_product(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_linear_torch", TORCH)  # which takes some of them
    x, weight = random(rows, 256), pack_linear(random(28672, 256, seed=1, scale=1 / 16))
    most = rows_at_once(8192, x.device)
    out, expected = (torch.full((rows, 14336), float("nan"), device="cuda", dtype=x.dtype) for _ in range(2))
    gated_linear(out, out.new_empty(min(rows, most), 28672), x, weight, "silu")
    gated_linear(expected, out.new_empty(rows, 28672), x, weight, "silu")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("rows", [5, 16])
def test_runs_repeat_bit_for_bit(rows: int) -> None:
    first, _ = product(rows, 4096, 14336, torch.bfloat16, bias=False)
    assert all(torch.equal(product(rows, 4096, 14336, torch.bfloat16, bias=False)[0], first) for _ in range(10))


def test_rows_may_be_strided() -> None:
    wide = random(7, 2048)
    weight = random(512, 1024, seed=1)
    out = torch.zeros(7, 1536, device="cuda", dtype=torch.bfloat16)
    linear(out[:, 512:1024], wide[:, 1024:], pack_linear(weight))
    assert_near(out[:, 512:1024], wide[:, 1024:].double() @ weight.double().t())
    assert not out[:, :512].any()
    assert not out[:, 1024:].any()


@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_layers_in_a_graph_equal_kernels_that_waited_for_one_another(rows: int) -> None:
    """Kernels start before the one before them ends, share counters and partial sums, and fetch the next weight."""
    shapes = [(1536, 1024), (1024, 1024), (5632, 1024), (1024, 2816)]
    weights = [pack_linear(random(n, k, seed=i, scale=k**-0.5)) for i in range(6) for n, k in shapes]
    start, gain = random(rows, 1024, seed=99), random(1024, seed=98)
    qkv, hidden, activated = (start.new_zeros(rows, width) for width in (1536, 1024, 2816))
    residual, branch = torch.empty_like(start), torch.empty_like(start)

    def layers(after: Callable[[], None]) -> None:
        residual.copy_(start)
        branch.zero_()
        for i in range(0, len(weights), 4):
            steps: list[Callable[[LinearWeight, LinearWeight], None]] = [
                lambda weight, following: linear(qkv, hidden, weight, following=following),
                lambda weight, following: linear(branch, qkv[:, :1024], weight, following=following),
                lambda weight, following: gated_linear(
                    activated, activated, hidden, weight, "silu", following=following
                ),
                lambda weight, following: linear(branch, activated, weight, following=following),
            ]
            for j, step in enumerate(steps):
                if j % 2 == 0:
                    norm(hidden, branch, gain, eps=1e-5, residual=residual)
                    after()
                step(weights[i + j], weights[(i + j + 1) % len(weights)])
                after()

    layers(torch.cuda.synchronize)
    expected = [residual.clone(), branch.clone()]
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers(lambda: None)
    for _ in range(30):
        for buffer in (qkv, hidden, activated, branch, residual):
            buffer.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(residual, expected[0])
        assert torch.equal(branch, expected[1])
