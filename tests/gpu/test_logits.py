"""Log-probabilities and penalties on the card: the CPU's results, and within a captured graph."""

from __future__ import annotations

import pytest
import torch

from mii.ops.logits import Bias, PenaltyTable, apply_penalties, score
from tests.ops.test_logits import Penalties, check_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 128256])
def test_scores_are_those_of_a_stable_sort_and_of_each_row_alone(vocab: int, dtype: torch.dtype) -> None:
    check_scores("cuda", dtype, vocab)


def test_a_graph_follows_what_is_recorded() -> None:
    rows, vocab = 4, 1000
    logits, out = torch.randn(rows, vocab, device="cuda").bfloat16(), torch.empty(rows, vocab, device="cuda")
    slots = torch.tensor([2, 0, -1, 1], dtype=torch.int32, device="cuda")
    tokens = torch.tensor([5, 6, 7, 8], dtype=torch.int32, device="cuda")
    tables = {device: PenaltyTable.allocate(3, vocab, device) for device in ("cuda", "cpu")}
    for table in tables.values():
        table.assign(2, Penalties(1.2, 0.5, 0.25), [1, 2, 3], [4, 4])
    bias = Bias.of([{9: 1.5}, {}, {}, {10: -2.0}], vocab, "cuda")

    def step() -> None:
        tables["cuda"].record(slots, tokens)
        apply_penalties(out, logits, slots, table=tables["cuda"], bias=bias)
        score(out, tokens, 5)

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    before = tables["cuda"].counts.clone()
    step()
    tables["cuda"].counts.copy_(before)
    with torch.cuda.graph(graph):
        step()
    expected = torch.empty(rows, vocab)
    for _ in range(3):
        graph.replay()
        tables["cpu"].record(slots.cpu(), tokens.cpu())
    apply_penalties(expected, logits.cpu(), slots.cpu(), table=tables["cpu"], bias=Bias(*(t.cpu() for t in bias)))
    torch.testing.assert_close(out[[0, 1, 3]].cpu(), expected[[0, 1, 3]])
