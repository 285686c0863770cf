"""What the tests of the experts' products on a card share."""

from __future__ import annotations

import torch

from mii.ops import abi, native
from mii.ops.moe import moe_combine, moe_down_reference, moe_mlp, moe_up_reference
from mii.ops.moe_routing import Routing, route
from tests.ops.moe_cases import MoeCase, lists

# Row and column tiles that are whole, cut off and of one row; k that ends within a step; fewer units than processors
# and many for each; experts without rows, with one and with most of them.
SMALL = (
    MoeCase(1, 64, 8, Routing(4, 1)),
    MoeCase(1, 2048, 768, Routing(128, 8)),
    MoeCase(7, 136, 72, Routing(5, 2), live=4),
    MoeCase(8, 264, 200, Routing(8, 2), crowded=True),
    MoeCase(8, 64, 64, Routing(8, 2), live=0),
    MoeCase(7, 144, 80, Routing(40, 2), live=5),
    MoeCase(8, 1040, 304, Routing(4, 3), crowded=True),
)
MORE = (
    MoeCase(16, 512, 328, Routing(16, 4), live=15, crowded=True),
    MoeCase(30, 200, 96, Routing(3, 1)),
    MoeCase(64, 1024, 384, Routing(64, 6), live=50),
)
MANY = (
    MoeCase(100, 264, 136, Routing(3, 2), live=90, crowded=True),
    MoeCase(300, 328, 264, Routing(7, 2)),
    MoeCase(700, 512, 384, Routing(60, 8), live=699),
    MoeCase(128, 64, 128, Routing(1, 1)),
    MoeCase(200, 1024, 520, Routing(16, 4), live=0),
)


def check_products(case: MoeCase, kernel: int, tile_rows: int, dtype: torch.dtype, kind: str = "silu") -> None:
    """Both products of a case by one kernel against plain torch, several times: counters reset themselves."""
    routing, pairs, routed = case.routing, case.tokens * case.routing.top_k, case.routed * case.routing.top_k
    up, down = case.weights(dtype, "cuda")
    for seed in range(3):
        rows, x = lists(case, "cuda", kernel, tile_rows), case.x(dtype, "cuda", seed)
        route(rows, case.logits(dtype, "cuda", seed), routing, counts=case.counts("cuda"))
        hidden, expected = (torch.full((pairs, case.width), torch.nan, dtype=dtype, device="cuda") for _ in range(2))
        parts = torch.full((pairs, case.hidden), torch.nan, dtype=dtype, device="cuda")
        moe_mlp(parts, hidden, x, up, down, rows, routing, kind)
        moe_up_reference(expected, x, up, rows, routing, kind)
        assert_near(hidden[:routed], expected[:routed])
        assert hidden[routed:].isnan().all()
        expected = torch.full_like(parts, torch.nan)
        moe_down_reference(expected, hidden, down, rows)
        assert_near(parts[:routed], expected[:routed])
        assert parts[routed:].isnan().all()


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for two roundings of the dtype, of values around 1."""
    tolerance = 4 * torch.finfo(expected.dtype).eps if expected.dtype != torch.float32 else 3e-5
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


class Layer:
    """Routing, products and sum of one mixture of experts on buffers that stay, as a step has them."""

    def __init__(self, case: MoeCase, kernel: int, tile_rows: int) -> None:
        dtype, pairs = torch.bfloat16, case.tokens * case.routing.top_k
        self.case, self.rows = case, lists(case, "cuda", kernel, tile_rows)
        self.up, self.down = case.weights(dtype, "cuda")
        self.counts = torch.zeros(abi.COUNTS, dtype=torch.int32, device="cuda")
        self.logits, self.x = case.logits(dtype, "cuda"), case.x(dtype, "cuda")
        self.hidden = torch.zeros(pairs, case.width, dtype=dtype, device="cuda")
        self.parts = torch.zeros(pairs, case.hidden, dtype=dtype, device="cuda")
        self.out = torch.full((case.tokens, case.hidden), torch.nan, dtype=dtype, device="cuda")

    def __call__(self) -> torch.Tensor:
        route(self.rows, self.logits, self.case.routing, counts=self.counts)
        return self.multiply()

    def multiply(self) -> torch.Tensor:
        """The products and their sum by the routing that is there."""
        routing = self.case.routing
        moe_mlp(self.parts, self.hidden, self.x, self.up, self.down, self.rows, routing, "silu")
        moe_combine(self.out, self.parts, top_k=routing.top_k, counts=self.counts)
        return self.out

    def fill(self, live: int, seed: int) -> None:
        self.counts[abi.NUM_TOKENS] = live
        self.logits.copy_(self.case.logits(torch.bfloat16, "cuda", seed))
        self.x.copy_(self.case.x(torch.bfloat16, "cuda", seed + 100))


def check_graph(case: MoeCase, kernel: int, tile_rows: int) -> None:
    """One captured graph serves every routing and every number of tokens, and repeats bit for bit."""
    layer = Layer(case, kernel, tile_rows)
    layer.fill(case.tokens, 0)
    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    for seed, live in enumerate((case.tokens, 1, 0, case.tokens // 2 + 1, case.tokens)):
        layer.fill(live, seed)
        graph.replay()
        first = layer.out.clone()
        graph.replay()
        assert torch.equal(layer.out, first)
        with native.reference_ops():
            expected = layer().clone()
        assert_near(first, expected)
        assert not first[live:].any()
