"""Routing: the kernels' lists equal those of plain torch, whatever the number of experts and of tokens."""

from __future__ import annotations

import pytest
import torch

from mii.ops import abi, native
from mii.ops import moe_routing as module
from mii.ops.moe_routing import ExpertLists, Routing, most_tiles, route, route_reference
from tests.ops.cpu_library import DTYPES, ISAS, using
from tests.ops.moe_cases import ROUTED_TOKENS, ROUTINGS, MoeCase, lists, same_lists


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_lists_equal_reference(isa: str, routing: Routing, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = module.route_reference
    monkeypatch.setattr(module, "route_reference", lambda *a, **k: pytest.fail("no kernel took it"))
    bias = torch.randn(routing.experts, generator=torch.Generator().manual_seed(5))
    with using(isa):
        for dtype in DTYPES:
            for number, (tokens, live) in enumerate(ROUTED_TOKENS):
                case = MoeCase(tokens, 1, 1, routing, live, crowded=number % 2 == 1)
                got, expected = (lists(case, "cpu", tile_rows=(8, 16, 64)[number % 3]) for _ in range(2))
                options = {"bias": bias if number % 3 == 0 else None, "counts": case.counts("cpu")}
                route(got, case.logits(dtype, "cpu"), routing, **options)
                reference(expected, case.logits(dtype, "cpu"), routing, **options)
                same_lists(got, expected, case.routed, routing.top_k)


def test_equal_scores_go_to_the_lower_expert() -> None:
    case = MoeCase(5, 1, 1, Routing(40, 3))
    for reference in (False, True):
        rows = lists(case, "cpu")
        logits = torch.zeros(5, 40)
        logits[:, 30:] = 1.0
        (route_reference if reference else route)(rows, logits, case.routing)
        assert rows.chosen.tolist() == [30, 31, 32] * 5
        torch.testing.assert_close(rows.weights, torch.full((15,), 1 / 3))


def test_weights_follow_the_definition() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    probabilities = logits.softmax(dim=1)[0]
    for renormalise, total in ((False, 1.0), (True, float(probabilities[1] + probabilities[2]))):
        routing = Routing(4, 2, renormalise=renormalise, scale=3.0)
        rows = ExpertLists(routing, 1, torch.device("cpu")).rows(1, abi.MOE_SIMPLE, 8)
        route(rows, logits, routing)
        assert rows.chosen.tolist() == [1, 2]
        torch.testing.assert_close(rows.weights, 3.0 * probabilities[1:3] / total)


def test_a_bias_chooses_but_does_not_weigh() -> None:
    routing = Routing(3, 1, scoring="sigmoid", renormalise=False)
    rows = ExpertLists(routing, 1, torch.device("cpu")).rows(1, abi.MOE_SIMPLE, 8)
    route(rows, torch.tensor([[2.0, 0.0, 1.0]]), routing, bias=torch.tensor([0.0, 5.0, 0.0]))
    assert rows.chosen.tolist() == [1]
    torch.testing.assert_close(rows.weights, torch.tensor([0.5]))


@pytest.mark.parametrize("scoring", abi.MOE_SCORINGS)
def test_a_token_chooses_from_its_best_groups(scoring: str) -> None:
    """Softmax: the group with the largest score comes first. Sigmoid: that with the largest two."""
    logits = torch.tensor([[4.0, -9.0, 2.5, 2.4, 3.0, -9.0]])
    routing = Routing(6, 2, scoring=scoring, renormalise=False, groups=3)
    for reference in (False, True):
        rows = ExpertLists(routing, 1, torch.device("cpu")).rows(1, abi.MOE_SIMPLE, 8)
        (route_reference if reference else route)(rows, logits, routing)
        assert rows.chosen.tolist() == ([0, 1] if scoring == "softmax" else [2, 3])


@pytest.mark.parametrize("isa", ISAS)
def test_logits_that_are_no_numbers_still_choose_experts(isa: str) -> None:
    """A broken row must not lead a kernel to an expert that does not exist."""
    case = MoeCase(6, 1, 1, Routing(20, 4))
    with using(isa):
        for value in (torch.nan, torch.inf, -torch.inf):
            rows, logits = lists(case, "cpu"), torch.randn(6, 20)
            logits[2] = value
            logits[4, 7] = value
            route(rows, logits, case.routing)
            chosen = rows.chosen.view(6, 4)
            assert chosen.min() >= 0
            assert chosen.max() < 20
            assert all(len(set(row)) == 4 for row in chosen.tolist())
            assert sorted(rows.pairs.tolist()) == list(range(24))


def test_the_most_tiles_are_enough() -> None:
    for routing in ROUTINGS:
        for tokens in (1, 5, 64, 300):
            for crowded in (False, True):
                case = MoeCase(tokens, 1, 1, routing, crowded=crowded)
                rows = lists(case, "cpu")
                route(rows, case.logits(torch.float32, "cpu"), routing)
                assert int(rows.tiles[0, 0]) <= most_tiles(routing, tokens, 8)


def test_a_routing_that_no_kernel_takes_is_done_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library(torch.device("cpu")) is None:
        pytest.skip("the native library is not built")
    case = MoeCase(9, 1, 1, Routing(7, 3))
    expected, got = lists(case, "cpu"), lists(case, "cpu")
    route(expected, case.logits(torch.float32, "cpu"), case.routing)
    monkeypatch.setattr(native.Library, "call", lambda *a: False)
    route(got, case.logits(torch.float32, "cpu"), case.routing)
    same_lists(got, expected, 9, 3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="5 of 4 experts"):
        Routing(4, 5)
    with pytest.raises(ValueError, match="'cosine'"):
        Routing(4, 2, scoring="cosine")
    for groups, top_groups in ((3, 1), (2, 3), (2, 0), (0, 0)):
        with pytest.raises(ValueError, match=f"{top_groups} of {groups} groups of 4 experts"):
            Routing(4, 1, groups=groups, top_groups=top_groups)
    with pytest.raises(ValueError, match="1 groups of 2 experts are too few to choose 3 from"):
        Routing(4, 3, groups=2)
    case = MoeCase(3, 1, 1, Routing(4, 2))
    with pytest.raises(ValueError, match=r"must be \[3, 4\]"):
        route(lists(case, "cpu"), torch.zeros(3, 5), case.routing)
    with pytest.raises(ValueError, match=r"must be \[4\] of float32"):
        route(lists(case, "cpu"), torch.zeros(3, 4), case.routing, bias=torch.zeros(4, dtype=torch.float16))
