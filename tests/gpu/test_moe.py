"""Mixture of experts on a card: routing, the products by each kernel, the sum, all in one graph."""

from __future__ import annotations

import pytest
import torch

from mii.ops import abi
from mii.ops import moe as module
from mii.ops import moe_routing as routing_module
from mii.ops.moe import moe_combine, moe_combine_reference
from mii.ops.moe_routing import Routing, route
from tests.gpu.moe_checks import MANY, MORE, SMALL, assert_near, check_graph, check_products
from tests.ops.kernel_checks import DTYPES
from tests.ops.moe_cases import ROUTED_TOKENS, ROUTINGS, MoeCase, lists, same_lists

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_lists_equal_reference(routing: Routing, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = routing_module.route_reference
    monkeypatch.setattr(routing_module, "route_reference", lambda *a, **k: pytest.fail("no kernel took it"))
    bias = torch.randn(routing.experts, generator=torch.Generator().manual_seed(5)).cuda()
    for number, (tokens, live) in enumerate((*ROUTED_TOKENS, (5000, 4321))):
        case = MoeCase(tokens, 1, 1, routing, live, crowded=number % 2 == 1)
        got, expected = (lists(case, "cuda", tile_rows=(8, 16, 64)[number % 3]) for _ in range(2))
        options = {"bias": bias if number % 3 == 0 else None, "counts": case.counts("cuda")}
        route(got, case.logits(dtype, "cuda"), routing, **options)
        reference(expected, case.logits(dtype, "cuda"), routing, **options)
        pairs = case.routed * routing.top_k
        assert bool((got.chosen == expected.chosen)[:pairs].float().mean() > 0.999 if pairs else True)
        if torch.equal(got.chosen[:pairs], expected.chosen[:pairs]):  # else two scores differ by their rounding alone
            same_lists(got, expected, case.routed, routing.top_k)


def test_more_experts_than_the_kernel_takes_are_routed_by_torch() -> None:
    case = MoeCase(9, 1, 1, Routing(600, 3))
    got, expected = lists(case, "cuda"), lists(case, "cpu")
    route(got, case.logits(torch.float32, "cuda"), case.routing)
    route(expected, case.logits(torch.float32, "cpu"), case.routing)
    assert got.chosen.cpu().tolist() == expected.chosen.tolist()
    assert got.pairs.cpu().tolist() == expected.pairs.tolist()


def test_logits_that_are_no_numbers_still_choose_experts() -> None:
    case = MoeCase(6, 1, 1, Routing(20, 4))
    for value in (torch.nan, torch.inf, -torch.inf):
        rows, logits = lists(case, "cuda"), torch.randn(6, 20, device="cuda")
        logits[2] = value
        logits[4, 7] = value
        route(rows, logits, case.routing)
        chosen = rows.chosen.view(6, 4).tolist()
        assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 20 for row in chosen)
        assert sorted(rows.pairs.tolist()) == list(range(24))


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What falls back to plain torch fails."""
    for name in ("moe_up_reference", "moe_down_reference", "moe_combine_reference"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("no kernel took it"))


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SMALL, MORE[0], MANY[0], MoeCase(9, 33, 17, Routing(4, 2))], ids=str)
def test_simple_kernel_equals_reference(case: MoeCase, dtype: torch.dtype) -> None:
    check_products(case, abi.MOE_SIMPLE, 8, dtype)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [*SMALL, *MORE, *MANY], ids=str)
def test_stream_equals_reference(case: MoeCase, dtype: torch.dtype) -> None:
    for tile_rows in (8, 16, 64):
        check_products(case, abi.MOE_STREAM, tile_rows, dtype)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [*SMALL, *MORE, *MANY], ids=str)
def test_tensor_core_tiles_equal_reference(case: MoeCase, dtype: torch.dtype) -> None:
    check_products(case, abi.MOE_MMA, 128, dtype)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "gelu_quick", "relu", "relu2"])
@pytest.mark.parametrize("kernel", [(abi.MOE_SIMPLE, 8), (abi.MOE_STREAM, 8), (abi.MOE_MMA, 128)])
def test_every_activation_equals_reference(kernel: tuple[int, int], kind: str) -> None:
    check_products(MoeCase(8, 64, 48, Routing(4, 2)), *kernel, torch.bfloat16, kind)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 72, 2048])
def test_sum_equals_reference(width: int, dtype: torch.dtype) -> None:
    case = MoeCase(9, width, 1, Routing(4, 3), live=7)
    parts = torch.randn(27, width, device="cuda").to(dtype)
    shared, gate = torch.randn(9, width + 8, device="cuda").to(dtype), torch.randn(9, 1, device="cuda").to(dtype)
    for options in ({}, {"shared": shared[:, :width]}, {"shared": shared[:, :width], "shared_gate": gate}):
        out, expected = (torch.full((9, width), torch.nan, dtype=dtype, device="cuda") for _ in range(2))
        moe_combine(out, parts, top_k=3, counts=case.counts("cuda"), **options)
        moe_combine_reference(expected, parts, top_k=3, counts=case.counts("cuda"), **options)
        assert_near(out, expected)


@pytest.mark.parametrize(
    ("case", "kernel", "tile_rows"),
    [
        (MoeCase(8, 512, 264, Routing(32, 4)), abi.MOE_SIMPLE, 8),
        (MoeCase(8, 512, 264, Routing(32, 4)), abi.MOE_STREAM, 8),
        (MoeCase(16, 2048, 768, Routing(128, 8)), abi.MOE_STREAM, 16),
        (MoeCase(200, 512, 264, Routing(32, 4)), abi.MOE_STREAM, 64),
        (MoeCase(500, 512, 264, Routing(8, 2)), abi.MOE_MMA, 128),
    ],
    ids=str,
)
def test_one_graph_serves_every_routing(case: MoeCase, kernel: int, tile_rows: int) -> None:
    check_graph(case, kernel, tile_rows)
