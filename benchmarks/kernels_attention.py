"""Paged attention: decode against the memory's bandwidth, prompts against the tensor cores, mixed steps, the plan.

Heads are those of Llama-3-8B (32 query, 8 KV, 128 elements) unless a case says otherwise, blocks hold 64 tokens and lie
scattered in the cache, sequences are of equal length. `bytes` counts keys, values, queries and results once; `flops`
counts the products that the causal mask and the window leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import Call, Case, run_cases
from mii.ops import abi
from mii.ops.attention import AttentionBatch, AttentionPlan, attention

DTYPE = torch.bfloat16
SIZE = 2  # bytes of an element


@dataclass(frozen=True)
class Work:
    """(query tokens, context) of each sequence, and the heads."""

    lengths: tuple[tuple[int, int], ...]
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block: int = 64
    window: int = 0
    softcap: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(q for q, _ in self.lengths)

    @property
    def bytes(self) -> int:
        seen = [min(kv, q + self.window) if self.window else kv for q, kv in self.lengths]
        return SIZE * self.head_dim * 2 * (self.kv_heads * sum(seen) + self.q_heads * self.tokens)

    @property
    def flops(self) -> int:
        pairs = sum(min(self.window or kv, kv - q + 1 + i) for q, kv in self.lengths for i in range(q))
        return 4 * self.head_dim * self.q_heads * pairs


def run(device: torch.device) -> list[dict[str, Any]]:
    return run_cases(_cuda_cases() if device.type == "cuda" else _cpu_cases(), device)


def _cuda_cases() -> Iterator[Case]:
    for seqs, context in ((64, 2048), (16, 8192), (256, 1024), (1, 8192)):
        yield _decode(f"{seqs} x {context}", Work(((1, context),) * seqs))
    for seqs, context in ((1, 512), (64, 256), (256, 128), (256, 200), (512, 200), (768, 330)):
        yield _decode(f"{seqs} x {context}", Work(((1, context),) * seqs))
    yield _decode("512 x 200, heads 64/8", Work(((1, 200),) * 512, q_heads=64))
    yield _decode("64 x 2048, heads 32/32", Work(((1, 2048),) * 64, kv_heads=32))
    yield _decode("64 x 2048, heads 64/8", Work(((1, 2048),) * 64, q_heads=64))
    yield _decode("64 x 2048, blocks of 16", Work(((1, 2048),) * 64, block=16))
    yield _decode("64 x 2048, heads of 64", Work(((1, 2048),) * 64, head_dim=64))
    yield _decode("64 x 2048, heads 16/8 of 256, softcap", Work(((1, 2048),) * 64, 16, 8, 256, softcap=50.0))
    yield _decode("64 x 2048, heads 16/16 of 192", Work(((1, 2048),) * 64, 16, 16, 192))
    yield _decode("64 x 8192, window 1024", Work(((1, 8192),) * 64, window=1024))
    yield _decode("64 x 2048, heads 71/1 of 64", Work(((1, 2048),) * 64, 71, 1, 64))
    for seqs, length in ((1, 2048), (8, 2048), (2, 8192), (32, 512)):
        yield _prompt(f"{seqs} prompts of {length}", Work(((length, length),) * seqs))
    yield _prompt("1 prompt of 32768", Work(((32768, 32768),)))
    yield _prompt("8 prompts of 2048, heads 32/32", Work(((2048, 2048),) * 8, kv_heads=32))
    yield _prompt("8 prompts of 2048, heads of 64", Work(((2048, 2048),) * 8, head_dim=64))
    yield _prompt("8 prompts of 2048, heads 16/8 of 256", Work(((2048, 2048),) * 8, 16, 8, 256))
    yield _prompt("2 prompts of 2048, heads 16/16 of 192", Work(((2048, 2048),) * 2, 16, 16, 192))
    yield _prompt("8 prompts of 2048, softcap", Work(((2048, 2048),) * 8, softcap=50.0))
    yield _prompt("2 prompts of 8192, window 1024", Work(((8192, 8192),) * 2, window=1024))
    yield _prompt("chunk of 512 at 8192", Work(((512, 8192),)))
    yield _prompt("chunk of 512 at 2048, 256 x 1 at 1024", Work(((512, 2048), *(((1, 1024),) * 256))))
    for text, lengths in (
        ("64 decode", ((1, 1000),) * 64),
        ("2048 decode", ((1, 1000),) * 2048),
        ("128 prompts of 128", ((128, 128),) * 128),
        ("1 prompt of 16384", ((16384, 16384),)),
    ):
        yield Case("attention plan", text, 16 * len(lengths), lambda device, w=Work(lengths): _plan_call(w, device))


def _cpu_cases() -> Iterator[Case]:
    small = {"q_heads": 9, "kv_heads": 3, "head_dim": 64, "block": 32}
    for seqs, context in ((1, 1024), (8, 512), (64, 256)):
        yield _decode(f"{seqs} x {context}, heads 9/3 of 64", Work(((1, context),) * seqs, **small))
    yield _prompt("1 prompt of 512, heads 9/3 of 64", Work(((512, 512),), **small))


def _decode(text: str, work: Work) -> Case:
    return Case("attention", f"decode {text}", work.bytes, lambda device: _call(work, device))


def _prompt(text: str, work: Work) -> Case:
    return Case("attention", text, work.bytes, lambda device: _call(work, device), work.flops)


def attention_batch(work: Work, device: torch.device) -> tuple[AttentionBatch, int]:
    """The batch and how many blocks its cache has."""
    blocks = [-(-context // work.block) for _, context in work.lengths]
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    order = torch.randperm(sum(blocks), dtype=torch.int32)
    for row, part in zip(table, order.split(blocks), strict=True):
        row[: len(part)] = part
    counts = torch.zeros(abi.COUNTS, dtype=torch.int32)
    counts[abi.NUM_SEQS], counts[abi.NUM_TOKENS] = len(blocks), work.tokens
    starts = torch.tensor([0, *(q for q, _ in work.lengths)]).cumsum(0).int()
    contexts = torch.tensor([context for _, context in work.lengths], dtype=torch.int32)
    tensors = (counts, torch.arange(len(blocks), dtype=torch.int32), starts, contexts, table)
    return AttentionBatch(*(t.to(device) for t in tensors), len(blocks), work.tokens), sum(blocks)


def attention_plan(work: Work, batch: AttentionBatch, device: torch.device) -> AttentionPlan:
    """A plan that holds the batch."""
    plan = AttentionPlan(
        q_heads=work.q_heads, kv_heads=work.kv_heads, head_dim=work.head_dim, block_size=work.block, device=device,
        max_seqs=batch.max_seqs, max_tokens=batch.max_tokens, max_blocks=batch.block_table.shape[1], dtype=DTYPE,
        window=work.window,
    )  # fmt: skip
    plan.update(batch)
    return plan


def _plan_call(work: Work, device: torch.device) -> Call:
    batch, _ = attention_batch(work, device)
    plan = attention_plan(work, batch, device)
    return lambda: plan.update(batch)


def _call(work: Work, device: torch.device) -> Call:
    batch, blocks = attention_batch(work, device)
    plan = attention_plan(work, batch, device)
    shape = (blocks, work.kv_heads, work.block, work.head_dim)
    k_cache, v_cache = (torch.randn(shape, device=device, dtype=DTYPE) for _ in range(2))
    q = torch.randn(work.tokens, work.q_heads * work.head_dim, device=device, dtype=DTYPE)
    out, scale = torch.empty_like(q), work.head_dim**-0.5
    return lambda: attention(out, q, k_cache, v_cache, batch, plan, scale=scale, softcap=work.softcap)
