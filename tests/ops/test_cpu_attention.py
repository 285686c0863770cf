"""Paged attention: each instruction set against plain torch, over ragged batches with NaN in all unused cache slots."""

from __future__ import annotations

import itertools

import pytest
import torch

from mii.ops import abi
from mii.ops.attention import AttentionBatch, AttentionPlan, attention, attention_reference
from tests.ops.cpu_library import DTYPES, ISAS, TOLERANCE, using

# (query tokens, tokens before them) of each sequence
DECODES = [(1, 0), (1, 14), (1, 15), (1, 16), (1, 200)]
ONE_LONG_DECODE = [(1, 1500)]
PROMPTS = [(15, 0), (16, 0), (17, 0), (70, 0), (1, 0)]
CHUNKS = [(40, 100), (1, 77), (130, 33), (2, 300), (3, 0)]
BATCHES = {"decodes": DECODES, "long decode": ONE_LONG_DECODE, "prompts": PROMPTS, "chunks": CHUNKS, "none": []}
HEADS = ((4, 4, 64), (9, 3, 64), (8, 1, 80), (2, 1, 20), (3, 3, 128))  # query heads, KV heads, head_dim


class Step:
    """A ragged batch over a shuffled cache whose unused slots, blocks and padding rows hold NaN."""

    def __init__(
        self, sequences: list[tuple[int, int]], heads: tuple[int, int, int], block_size: int, dtype: torch.dtype
    ) -> None:
        q_heads, kv_heads, head_dim = heads
        self.heads, self.block_size, self.dtype = heads, block_size, dtype
        count, tokens = len(sequences), sum(q for q, _ in sequences)
        self.tokens = tokens
        lengths = [q + before for q, before in sequences]
        max_blocks = max([-(-n // block_size) for n in lengths], default=1) + 1
        blocks = sum(-(-n // block_size) for n in lengths) + 2
        order = iter(torch.randperm(blocks).tolist())
        table = torch.full((count + 3, max_blocks), blocks - 1, dtype=torch.int32)
        slots = torch.randperm(count + 3)[:count].to(torch.int32)
        self.k, self.v = (
            torch.full((blocks, kv_heads, block_size, head_dim), torch.nan, dtype=dtype) for _ in range(2)
        )
        for s, length in enumerate(lengths):
            for first in range(0, length, block_size):
                block, used = next(order), min(block_size, length - first)
                table[slots[s], first // block_size] = block
                self.k[block, :, :used] = torch.randn(kv_heads, used, head_dim).to(dtype)
                self.v[block, :, :used] = torch.randn(kv_heads, used, head_dim).to(dtype)
        wide = (q_heads + 2 * kv_heads) * head_dim
        qkv = torch.full((tokens + 5, wide), torch.nan, dtype=dtype)
        qkv[:tokens] = torch.randn(tokens, wide).to(dtype)
        self.q = qkv[:, : q_heads * head_dim]
        counts = torch.zeros(abi.COUNTS, dtype=torch.int32)
        counts[abi.NUM_SEQS], counts[abi.NUM_TOKENS] = count, tokens
        starts = torch.tensor([0, *itertools.accumulate(q for q, _ in sequences)], dtype=torch.int32)
        padding = torch.full((2,), -7, dtype=torch.int32)
        kv_len = torch.tensor(lengths, dtype=torch.int32)
        self.batch = AttentionBatch(
            counts, torch.cat((slots, padding)), torch.cat((starts, padding)), torch.cat((kv_len, padding)), table,
            count + 2, tokens + 5,
        )  # fmt: skip

    def plan(self, window: int) -> AttentionPlan:
        q_heads, kv_heads, head_dim = self.heads
        return AttentionPlan(
            q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, block_size=self.block_size,
            max_seqs=self.batch.max_seqs, max_tokens=self.batch.max_tokens, max_blocks=self.batch.block_table.shape[1],
            dtype=self.dtype, device="cpu", window=window,
        )  # fmt: skip


def check(isa: str, step: Step, window: int = 0, tolerance: float = 1.0, **options: object) -> None:
    q_heads, _, head_dim = step.heads
    out, expected = (
        torch.full((step.tokens + 5, q_heads * head_dim + 3), torch.nan, dtype=step.dtype) for _ in range(2)
    )
    with using(isa):
        plan = step.plan(window)
        plan.update(step.batch)
        for _ in range(2):  # a plan serves every layer
            attention(out[:, :-3], step.q, step.k, step.v, step.batch, plan, scale=head_dim**-0.5, **options)
    attention_reference(
        expected[:, :-3], step.q, step.k, step.v, step.batch, scale=head_dim**-0.5, window=window, **options
    )
    assert torch.equal(out.isnan(), expected.isnan())
    tolerance *= TOLERANCE[step.dtype]
    torch.testing.assert_close(out.float().nan_to_num(), expected.float().nan_to_num(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("heads", HEADS)
def test_attention_equals_reference(isa: str, dtype: torch.dtype, batch: str, heads: tuple[int, int, int]) -> None:
    for block_size in (16, 128) if heads[2] == 64 else (32,):
        check(isa, Step(BATCHES[batch], heads, block_size, dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", ["decodes", "long decode", "chunks"])
@pytest.mark.parametrize("window", [1, 16, 90, 600])
def test_window_hides_older_keys(isa: str, dtype: torch.dtype, batch: str, window: int) -> None:
    check(isa, Step(BATCHES[batch], (6, 2, 64), 32, dtype), window)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", ["decodes", "long decode", "chunks"])
def test_softcap_and_alibi(isa: str, dtype: torch.dtype, batch: str) -> None:
    step = Step(BATCHES[batch], (6, 2, 64), 32, dtype)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.06, 0.03, 0.015])
    check(isa, step, softcap=2.0)
    check(isa, step, alibi_slopes=slopes)
    check(isa, step, window=50, softcap=3.0, alibi_slopes=slopes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_neither_overflow_nor_vanish(isa: str, dtype: torch.dtype) -> None:
    step = Step(CHUNKS, (4, 2, 64), 32, dtype)
    step.q.mul_(30)
    check(isa, step, tolerance=10)  # a score of 100 has a rounding error of 1e-5 itself


@pytest.mark.parametrize("isa", ISAS)
def test_a_smaller_batch_after_a_larger_one_uses_the_same_plan(isa: str) -> None:
    large, small = (Step(batch, (4, 2, 64), 32, torch.float32) for batch in (CHUNKS, DECODES[:2]))
    with using(isa):
        plan = large.plan(0)
        for step in (large, small):
            plan.update(step.batch)
            out = torch.zeros(step.tokens + 5, 256)
            expected = torch.zeros_like(out)
            attention(out, step.q, step.k, step.v, step.batch, plan, scale=0.125)
            attention_reference(expected, step.q, step.k, step.v, step.batch, scale=0.125)
            torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
