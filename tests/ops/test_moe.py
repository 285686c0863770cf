"""The experts' products: each instruction set against plain torch, and plain torch against the definition."""

from __future__ import annotations

import pytest
import torch

from mii.ops import abi
from mii.ops import moe as module
from mii.ops.moe import (
    choose_kernel,
    moe_combine,
    moe_combine_reference,
    moe_down,
    moe_down_reference,
    moe_mlp,
    moe_up,
    moe_up_reference,
)
from mii.ops.moe_routing import Routing, route
from mii.ops.moe_weights import pack_experts
from tests.ops.cpu_library import DTYPES, ISAS, assert_close, using
from tests.ops.kernel_checks import in_wider_rows
from tests.ops.moe_cases import MoeCase, lists

# widths below, at and past the panel (16), the AMX depth (32) and the span (64 panels); few tokens and many
CASES = (
    MoeCase(1, 64, 48, Routing(8, 2)),
    MoeCase(7, 33, 17, Routing(5, 2), live=4),
    MoeCase(4, 96, 1050, Routing(3, 1)),
    MoeCase(40, 100, 30, Routing(16, 4), crowded=True),
    MoeCase(300, 64, 64, Routing(2, 1)),
    MoeCase(3, 40, 40, Routing(4, 4), live=0),
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_equal_reference(isa: str, dtype: torch.dtype, case: MoeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("moe_up", "moe_down", "moe_combine"):
        monkeypatch.setattr(module, f"{name}_reference", lambda *a, **k: pytest.fail("no kernel took it"))
    routing, pairs, routed = case.routing, case.tokens * case.routing.top_k, case.routed * case.routing.top_k
    with using(isa):
        rows, counts = lists(case, "cpu"), case.counts("cpu")
        route(rows, case.logits(dtype, "cpu"), routing, counts=counts)
        up, down = case.weights(dtype, "cpu")
        x = in_wider_rows(case.x(dtype, "cpu"), 5)
        hidden, expected = (torch.full((pairs, case.width), torch.nan, dtype=dtype) for _ in range(2))
        moe_up(hidden, x, up, rows, routing, "silu")
        moe_up_reference(expected, x, up, rows, routing, "silu")
        assert_close(hidden[:routed], expected[:routed])
        assert hidden[routed:].isnan().all()
        parts, expected = (torch.full((pairs, case.hidden), torch.nan, dtype=dtype) for _ in range(2))
        moe_down(parts, hidden, down, rows, routing)
        moe_down_reference(expected, hidden, down, rows)
        assert_close(parts[:routed], expected[:routed])
        shared, gate = case.x(dtype, "cpu", seed=7), case.x(dtype, "cpu", seed=8)[:, :1].contiguous()
        for options in ({}, {"shared": shared}, {"shared": shared, "shared_gate": gate}):
            out, expected = (torch.full((case.tokens, case.hidden), torch.nan, dtype=dtype) for _ in range(2))
            moe_combine(out, parts, top_k=routing.top_k, counts=counts, **options)
            moe_combine_reference(expected, parts, top_k=routing.top_k, counts=counts, **options)
            assert_close(out, expected)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2"])
def test_every_activation_equals_reference(kind: str) -> None:
    case = MoeCase(5, 64, 48, Routing(4, 2))
    rows, (up, _) = lists(case, "cpu"), case.weights(torch.float32, "cpu")
    route(rows, case.logits(torch.float32, "cpu"), case.routing)
    hidden, expected = (torch.empty(10, 48) for _ in range(2))
    moe_up(hidden, case.x(torch.float32, "cpu"), up, rows, case.routing, kind)
    moe_up_reference(expected, case.x(torch.float32, "cpu"), up, rows, case.routing, kind)
    assert_close(hidden, expected)


def test_results_may_be_of_another_width_than_what_the_experts_read() -> None:
    case, generator = MoeCase(6, 24, 16, Routing(5, 2)), torch.Generator().manual_seed(0)
    up = pack_experts(torch.randn(5, 32, 24, generator=generator), gated=True)
    down = pack_experts(torch.randn(5, 40, 16, generator=generator), gated=False)
    rows, x = lists(case, "cpu"), case.x(torch.float32, "cpu")
    route(rows, case.logits(torch.float32, "cpu"), case.routing)
    hidden, parts, expected = torch.empty(12, 16), torch.empty(12, 40), torch.empty(12, 40)
    moe_mlp(parts, hidden, x, up, down, rows, case.routing, "silu")
    moe_up_reference(hidden, x, up, rows, case.routing, "silu")
    moe_down_reference(expected, hidden, down, rows)
    assert_close(parts, expected)


def test_the_whole_is_the_weighted_sum_of_the_chosen_experts() -> None:
    case = MoeCase(6, 24, 20, Routing(5, 2))
    logits, x = case.logits(torch.float32, "cpu"), case.x(torch.float32, "cpu")
    up, down = torch.randn(5, 40, 24), torch.randn(5, 24, 20)
    rows, hidden, parts, out = lists(case, "cpu"), torch.empty(12, 20), torch.empty(12, 24), torch.empty(6, 24)
    route(rows, logits, case.routing)
    moe_up(hidden, x, pack_experts(up, gated=True), rows, case.routing, "silu")
    moe_down(parts, hidden, pack_experts(down, gated=False), rows, case.routing)
    moe_combine(out, parts, top_k=2)
    for token in range(6):
        best = logits[token].topk(2)
        expected = torch.zeros(24)
        for weight, expert in zip(best.values.softmax(0), best.indices, strict=True):
            gate, value = (up[expert] @ x[token]).chunk(2)
            expected += weight * (down[expert] @ (torch.nn.functional.silu(gate) * value))
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_packed_weights_unpack_to_themselves(dtype: torch.dtype, gated: bool) -> None:
    weight = torch.randn(3, 2 * 37, 41).to(dtype)
    packed = pack_experts(weight, gated=gated)
    assert all(torch.equal(packed.expert(index), weight[index]) for index in range(3))


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = MoeCase(2, 8, 8, Routing(4, 2))
    rows, (up, down) = lists(case, "cpu"), case.weights(torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"must be \[2, 8\] and \[4, 8\]"):
        moe_up(torch.empty(4, 8), torch.empty(2, 9), up, rows, case.routing, "silu")
    with pytest.raises(ValueError, match="weight not gated"):
        moe_down(torch.empty(4, 8), torch.empty(4, 8), up, rows, case.routing)
    with pytest.raises(ValueError, match="weight gated"):
        moe_up(torch.empty(4, 8), torch.empty(2, 8), down, rows, case.routing, "silu")
    with pytest.raises(ValueError, match=r"scratch \(4, 9\) torch.float32 must be \[4, 8\]"):
        moe_up(torch.empty(4, 8), torch.empty(2, 8), up, rows, case.routing, "silu", scratch=torch.empty(4, 9))
    with pytest.raises(ValueError, match="pack_experts"):
        pack_experts(torch.empty(4, 7, 8), gated=True)
    with pytest.raises(ValueError, match="moe_combine"):
        moe_combine(torch.empty(2, 8), torch.empty(3, 8), top_k=2)


@pytest.mark.parametrize(
    ("capability", "kernel", "tile_rows"), [((8, 0), abi.MOE_MMA, 128), ((9, 0), abi.MOE_WGMMA, 192)]
)
def test_the_kernel_on_a_card_follows_from_the_number_of_rows(
    capability: tuple[int, int], kernel: int, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    card, wide, many = torch.device("cuda"), (2048, 768), Routing(128, 8)
    for tokens, rows in ((1, 8), (32, 8), (64, 16), (128, 16), (256, 64), (512, 64)):
        assert choose_kernel(many, tokens, wide, torch.bfloat16, card) == (abi.MOE_STREAM, rows)
    assert choose_kernel(many, 8192, wide, torch.bfloat16, card) == (kernel, tile_rows)
    assert choose_kernel(Routing(8, 2), 8192, wide, torch.bfloat16, card) == (kernel, tile_rows)
    assert choose_kernel(many, 1, wide, torch.float32, card) == (abi.MOE_SIMPLE, 8)
    assert choose_kernel(many, 1, (2044, 768), torch.bfloat16, card) == (abi.MOE_SIMPLE, 8)
    monkeypatch.setattr(module, "KERNELS", "mma")
    assert choose_kernel(many, 8192, wide, torch.bfloat16, card) == (abi.MOE_MMA, 128)
