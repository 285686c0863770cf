"""The CPU's matrix products and attention at the shapes of SmolLM2-135M, beside torch's in the same minutes.

A case runs its operation on the weights (or caches) of all layers in turn, as a step does, by a recorded list of calls
(mii.ops.recording); torch runs the same work on the same numbers from Python. Rounds of both alternate, so that what
else the machine does falls on both; `seconds` and `torch_seconds` are medians of one call, `best` and `torch_best` the
shortest. `bytes` counts weights (or keys and values), inputs and outputs once.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from mii.ops import abi
from mii.ops.attention import AttentionBatch, AttentionPlan, attention
from mii.ops.linear import linear, pack_linear
from mii.ops.recording import record

LAYERS = 30
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 32
LINEARS = {"qkv": (576, 960), "o": (576, 576), "gate-up": (576, 3072), "down": (1536, 576), "head": (576, 49152)}
ROWS = (1, 4, 16, 128, 512)
DTYPE = torch.bfloat16
SIZE = 2  # bytes of an element
ROUNDS = 15


def run(device: torch.device) -> list[dict[str, Any]]:
    if device.type != "cpu":
        return []
    with torch.inference_mode():
        return [*_linear_cases(), *_attention_cases()]


def _linear_cases() -> Iterator[dict[str, Any]]:
    for name, (in_features, out_features) in LINEARS.items():
        layers = 1 if name == "head" else LAYERS
        weights = [torch.randn(out_features, in_features).to(DTYPE) for _ in range(layers)]
        packed = [pack_linear(weight) for weight in weights]
        for rows in ROWS if name != "head" else ROWS[:3]:
            x, out = torch.randn(rows, in_features).to(DTYPE), torch.empty(rows, out_features, dtype=DTYPE)
            own = _recorded(lambda x=x, out=out, packed=packed: [linear(out, x, weight) for weight in packed])
            moved = SIZE * (in_features * out_features + rows * (in_features + out_features))
            yield {
                "kernel": "linear",
                "case": f"{name}, {rows} x {in_features} -> {out_features}",
                "bytes": moved,
                "flops": 2 * rows * in_features * out_features,
            } | _race(own, lambda x=x, weights=weights: [functional.linear(x, w) for w in weights], layers)
        del weights, packed


def _attention_cases() -> Iterator[dict[str, Any]]:
    shapes = {
        "one prompt of 512": [(512, 512)],
        "16 prompts of 128": [(128, 128)] * 16,
        "decode 1 x 512": [(1, 512)],
        "decode 1 x 4096": [(1, 4096)],
        "decode 16 x 192": [(1, 192)] * 16,
    }
    for text, lengths in shapes.items():
        yield _attention_case(text, lengths)


def _attention_case(text: str, lengths: list[tuple[int, int]]) -> dict[str, Any]:
    """All sequences are of one length, so that torch can have them as one batch without padding."""
    tokens, context = lengths[0]
    plan, batch, q, out, caches = _paged(lengths)

    def own() -> None:
        for k, v in caches:
            attention(out, q, k, v, batch, plan, scale=HEAD_DIM**-0.5)

    shape = (len(lengths), KV_HEADS, context, HEAD_DIM)
    dense = [(torch.randn(shape).to(DTYPE), torch.randn(shape).to(DTYPE)) for _ in range(LAYERS)]
    queries = torch.randn(len(lengths), HEADS, tokens, HEAD_DIM).to(DTYPE)

    def theirs() -> None:
        for k, v in dense:
            functional.scaled_dot_product_attention(queries, k, v, is_causal=tokens > 1, enable_gqa=True)

    pairs = sum(t * (c - t) + t * (t + 1) // 2 for t, c in lengths)
    rows = sum(t for t, _ in lengths)
    return {
        "kernel": "attention",
        "case": text,
        "bytes": SIZE * HEAD_DIM * 2 * (KV_HEADS * sum(c for _, c in lengths) + HEADS * rows),
        "flops": 4 * HEAD_DIM * HEADS * pairs,
    } | _race(_recorded(own), theirs, LAYERS)


def _paged(
    lengths: list[tuple[int, int]],
) -> tuple[AttentionPlan, AttentionBatch, torch.Tensor, torch.Tensor, list[Any]]:
    """Plan, batch, queries, output and the caches of every layer, with blocks in random order."""
    seqs, rows, context = len(lengths), sum(t for t, _ in lengths), lengths[0][1]
    per_seq = -(-context // BLOCK)
    caches = [
        tuple(torch.randn(seqs * per_seq, KV_HEADS, BLOCK, HEAD_DIM).to(DTYPE) for _ in range(2)) for _ in range(LAYERS)
    ]
    counts = torch.zeros(abi.COUNTS, dtype=torch.int32)
    counts[abi.NUM_SEQS], counts[abi.NUM_TOKENS] = seqs, rows
    batch = AttentionBatch(
        counts=counts,
        seq_slot=torch.arange(seqs, dtype=torch.int32),
        q_start=torch.tensor([0, *itertools.accumulate(t for t, _ in lengths)], dtype=torch.int32),
        kv_len=torch.tensor([c for _, c in lengths], dtype=torch.int32),
        block_table=torch.randperm(seqs * per_seq).to(torch.int32).view(seqs, per_seq),
        max_seqs=seqs,
        max_tokens=rows,
    )
    plan = AttentionPlan(
        q_heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, block_size=BLOCK, max_seqs=seqs, max_tokens=rows,
        max_blocks=per_seq, dtype=DTYPE, device="cpu",
    )  # fmt: skip
    plan.update(batch)
    q = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(DTYPE)[:, : HEADS * HEAD_DIM]
    return plan, batch, q, torch.empty(rows, HEADS * HEAD_DIM, dtype=DTYPE), caches


def _recorded(body: Callable[[], object]) -> Callable[[], object]:
    recording = record(lambda: body() and None)
    return body if recording is None else recording.replay


def _race(own: Callable[[], object], theirs: Callable[[], object], calls: int) -> dict[str, float]:
    """Times of one call of each, rounds alternating."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 2):
        for contender, spent in zip((own, theirs), times, strict=True):
            begin = time.perf_counter()
            contender()
            if turn >= 2:
                spent.append((time.perf_counter() - begin) / calls)
    mine, other = statistics.median(times[0]), statistics.median(times[1])
    return {
        "seconds": mine,
        "torch_seconds": other,
        "speedup": other / mine,
        "best": min(times[0]),
        "torch_best": min(times[1]),
    }
