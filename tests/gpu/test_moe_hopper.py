"""The experts' products by Hopper's warpgroup products: the edge grid and graphs. Not on other cards."""

from __future__ import annotations

import pytest
import torch

from mii.ops import abi
from mii.ops import moe as module
from mii.ops.moe_routing import Routing
from tests.gpu.moe_checks import MANY, MORE, SMALL, Layer, check_graph, check_products
from tests.ops.moe_cases import MoeCase


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the card is no Hopper")


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("moe_up_reference", "moe_down_reference"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("no kernel took it"))


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*SMALL, *MORE, *MANY], ids=str)
def test_warpgroup_tiles_equal_reference(case: MoeCase, dtype: torch.dtype) -> None:
    check_products(case, abi.MOE_WGMMA, 192, dtype)


@pytest.mark.usefixtures("kernels_only")
def test_a_large_product_equals_reference() -> None:
    check_products(MoeCase(2048, 2048, 768, Routing(16, 4)), abi.MOE_WGMMA, 192, torch.bfloat16)


def test_one_graph_serves_every_routing() -> None:
    check_graph(MoeCase(700, 512, 264, Routing(8, 2)), abi.MOE_WGMMA, 192)


def test_a_list_of_tiles_serves_any_number_of_products() -> None:
    layer = Layer(MoeCase(700, 512, 264, Routing(8, 2)), abi.MOE_WGMMA, 192)
    layer.counts[abi.NUM_TOKENS] = 700
    first = layer().clone()
    for _ in range(3):
        assert torch.equal(layer.multiply(), first)
    assert layer.rows.tiles[0, 1:].tolist() == [0, 0, 0]


@pytest.mark.usefixtures("kernels_only")
def test_a_gate_that_warpgroup_products_do_not_apply_is_served_too() -> None:
    check_products(MANY[0], abi.MOE_WGMMA, 192, torch.bfloat16, kind="relu2")
