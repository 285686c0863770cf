"""Products that are left in parts, and the norm that adds them up, on a card."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mii.ops import abi, linear_hopper
from mii.ops.linear import LinearWeight, linear, pack_linear
from mii.ops.moe import moe_combine
from mii.ops.norm import norm
from mii.ops.summands import Summands

# Features that are whole tiles and not; k that comes out even among parts, and among steps, and not.
SHAPES = [(4096, 4096), (4096, 14336), (3584, 18944), (5120, 5120), (2048, 2056), (4000, 1000), (8192, 1024)]
ROWS = [17, 33, 64]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    monkeypatch.setattr(linear_hopper, "_fast_memory", lambda device: True)


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").mul_(scale).to(dtype)


def memory() -> torch.Tensor:
    size = linear_hopper.parts_size(torch.device("cuda"))
    assert size
    return torch.full((size,), torch.nan, device="cuda")


def left(x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None, summands: torch.Tensor) -> Summands:
    out = torch.full((x.shape[0], weight.out_features), torch.nan, device="cuda", dtype=x.dtype)
    result = linear(out, x, weight, bias, summands=summands)
    assert isinstance(result, Summands)
    assert out.isnan().all()
    return result


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_parts_add_up_to_the_product(rows: int, shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    n, k = shape
    x, weight = random(rows, k, dtype=dtype), random(n, k, dtype=dtype, seed=1, scale=k**-0.5)
    offset = random(n, dtype=dtype, seed=2) if bias else None
    summands = memory()
    result = left(x, pack_linear(weight), offset, summands)
    assert len(result.parts) == linear_hopper.num_parts(n, k, linear_hopper._multiprocessors(x.device))
    expected = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    error = (result.parts.double().sum(0) - expected).norm() / expected.norm()
    assert error < 1e-5
    assert summands[result.parts.numel() :].isnan().all()


@pytest.mark.parametrize("kind", [abi.RMS, abi.RMS_PLUS1, abi.LAYER])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 256, 2048, 4096, 8192, 16384])
def test_a_norm_of_parts_is_that_of_their_sum(width: int, dtype: torch.dtype, kind: int) -> None:
    for count in (1, 2, 4, 8):
        rows = 40
        parts = Summands(random(count, rows, width, dtype=torch.float32, seed=count), dtype)
        residual, weight = random(rows, width, dtype=dtype, seed=1), random(width, dtype=dtype, seed=2)
        of_parts, of_whole = residual.clone(), residual.clone()
        out, expected = torch.full_like(residual, torch.nan), torch.empty_like(residual)
        norm(out, parts, weight, eps=1e-5, residual=of_parts, kind=kind)
        norm(expected, parts.total(), weight, eps=1e-5, residual=of_whole, kind=kind)
        assert torch.equal(of_parts, of_whole)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("width", [64, 256, 2048, 4096])
def test_a_norm_of_what_a_tokens_experts_gave_is_that_of_their_sum(width: int, dtype: torch.dtype) -> None:
    for rows, top_k in ((1, 8), (3, 2), (200, 6)):
        rows_of_pairs = random(rows * top_k, width, dtype=dtype, seed=top_k)
        parts = Summands(rows_of_pairs.unflatten(0, (rows, top_k)).transpose(0, 1), dtype)
        residual = random(rows, width, dtype=dtype, seed=1)
        of_parts, of_whole = residual.clone(), residual.clone()
        out, expected, whole = (
            torch.full_like(residual, torch.nan),
            torch.empty_like(residual),
            torch.empty_like(residual),
        )
        norm(out, parts, None, eps=1e-5, residual=of_parts)
        moe_combine(whole, rows_of_pairs, top_k=top_k)
        norm(expected, whole, None, eps=1e-5, residual=of_whole)
        assert torch.equal(of_parts, of_whole)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("rows", ROWS)
def test_layers_in_a_graph_equal_kernels_that_waited_for_one_another(rows: int) -> None:
    shapes = [(4096, 4096), (4096, 14336)] * 4
    weights = [
        pack_linear(random(n, k, dtype=torch.bfloat16, seed=i, scale=k**-0.5)) for i, (n, k) in enumerate(shapes)
    ]
    wide, residual = (random(rows, width, dtype=torch.bfloat16, seed=50) for width in (14336, 4096))
    start = wide[:, :4096]
    hidden, stream, summands = start.clone(), residual.clone(), memory()

    def run(after_each: Callable[[], object]) -> None:
        for weight in weights:
            x = hidden if weight.in_features == 4096 else wide
            parts = linear_hopper.parts(summands, x, weight.data, None)
            assert parts is not None
            norm(hidden, Summands(parts, x.dtype), None, eps=1e-5, residual=stream)
            after_each()

    run(torch.cuda.synchronize)
    expected, graph = (hidden.clone(), stream.clone()), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(lambda: None)
    for _ in range(5):
        hidden.copy_(start)
        stream.copy_(residual)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(hidden, expected[0])
        assert torch.equal(stream, expected[1])


def test_rows_that_are_not_whole_packs_are_added_up_by_torch() -> None:
    parts, residual = (
        Summands(random(2, 20, 100, dtype=torch.float32), torch.bfloat16),
        random(20, 100, dtype=torch.bfloat16),
    )
    of_parts, of_whole = residual.clone(), residual.clone()
    out, expected = torch.empty_like(residual), torch.empty_like(residual)
    norm(out, parts, None, eps=1e-5, residual=of_parts)
    norm(expected, parts.total(), None, eps=1e-5, residual=of_whole)
    assert torch.equal(of_parts, of_whole)
    torch.testing.assert_close(out, expected)
