"""The sampler on the card: the reference's tokens, bit for bit, over the grid of tests/ops/test_sampler.py."""

from __future__ import annotations

import pytest
import torch

from mii.ops import abi, native
from mii.ops.sampler import SamplingTable, sample
from tests.ops.test_sampler import DTYPES, VOCABULARIES, Choice, check_kernel, mixed_batch, mixed_logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_kernel_draws_the_tokens_of_the_reference(vocab: int, dtype: torch.dtype) -> None:
    for rows, shift in ((48, 0), (48, 5), (1, 0), (16, 1)):  # few rows run in larger clusters
        check_kernel(mixed_batch(rows, vocab, dtype, seed=vocab + rows, device="cuda", shift=shift))


def test_the_cpu_draws_the_same_tokens() -> None:
    batch = mixed_batch(40, 32000, torch.bfloat16, seed=3, device="cuda")
    tokens = batch.run()[0]
    batch.logits = batch.logits.cpu()
    batch.options = {name: tensor.cpu() for name, tensor in batch.options.items()}
    assert torch.equal(tokens.cpu(), batch.run()[0])


def test_a_graph_follows_rows_parameters_and_logits_that_change_between_replays() -> None:
    rows, vocab = 32, 5000
    table = SamplingTable.allocate(rows, "cuda")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    slots, positions, tokens, last_token = (torch.zeros(rows, dtype=torch.int32, device="cuda") for _ in range(4))
    counts, logprobs = torch.zeros(abi.COUNTS, dtype=torch.int32, device="cuda"), torch.zeros(rows, device="cuda")

    def call() -> None:
        sample(tokens, logits, table, slots, positions, counts=counts, last_token=last_token, logprobs=logprobs)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    generator = torch.Generator().manual_seed(0)
    for step, active in enumerate((32, 1, 0, 17, 31)):
        logits.copy_(mixed_logits(rows, vocab, generator))
        choices = [Choice(0.8 * ((s + step) % 2), 0.9, 0.0, 20 * (s % 3), s * step) for s in range(rows)]
        table.assign(range(rows), choices)
        slots.copy_(torch.randperm(rows, generator=generator))
        positions.fill_(step)
        counts[abi.NUM_SAMPLES] = active
        results = []
        for run in (graph.replay, call):
            for tensor in (tokens, last_token, logprobs):
                tensor.fill_(-9)
            if run is call:
                with native.reference_ops():
                    run()
            else:
                run()
            results.append((tokens.clone(), last_token.clone(), logprobs.clone()))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        torch.testing.assert_close(results[0][2], results[1][2], atol=2e-5, rtol=1e-5)


def test_clusters_of_different_sizes_draw_the_same_tokens() -> None:
    batch = mixed_batch(40, 128256, torch.bfloat16, seed=9, device="cuda")
    together, slots, positions = batch.run()[0], batch.slots, batch.positions
    assert slots is not None and positions is not None
    logits, suppress = batch.logits, batch.options["suppress"]
    for r in range(0, 40, 7):
        batch.logits, batch.slots, batch.positions = logits[r : r + 1], slots[r : r + 1], positions[r : r + 1]
        batch.options["suppress"] = suppress[r : r + 1]
        assert batch.run()[0] == together[r]
