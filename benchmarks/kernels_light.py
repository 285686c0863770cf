"""The kernels around the matrix products, at the shapes of Llama-3-8B: one case a kernel and a number of rows.

`bytes` counts every input read once and every output written once. Inputs that fit the cache in a real step (1 and 64
rows) fit it here too; the larger cases take turns on enough memory to come from DRAM.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.timing import Call, Case, run_cases
from mii.ops import abi
from mii.ops.activation import activation
from mii.ops.embedding import embedding
from mii.ops.gather import gather
from mii.ops.norm import norm
from mii.ops.prepare import StepTensors, prepare
from mii.ops.rope_kv import rope_kv

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 64
DTYPE = torch.bfloat16
SIZE = 2  # bytes of an element


def run(device: torch.device) -> list[dict[str, Any]]:
    rows = (1, 64, 512, 8192) if device.type == "cuda" else (1, 64, 512)
    return run_cases(_cases(rows), device)


def _cases(rows: tuple[int, ...]) -> Iterator[Case]:
    for n in rows:
        yield Case("norm", f"add + RMS, {n} x {HIDDEN}", SIZE * HIDDEN * (4 * n + 1), lambda d, n=n: _norm(d, n))
        yield Case(
            "norm",
            f"RMS + add + RMS, {n} x {HIDDEN}",
            SIZE * HIDDEN * (4 * n + 2),
            lambda d, n=n: _norm(d, n, normed_before=True),
        )
    for n in rows:
        moved = n * HEAD_DIM * SIZE * (2 * HEADS + 5 * KV_HEADS)  # q, k in and out, v in, k and v to the cache
        text = f"{n} tokens, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}"
        yield Case("rope_kv", text, moved, lambda d, n=n: _rope_kv(d, n))
    for n in rows:
        text = f"SiLU gated, {n} x {INTERMEDIATE}"
        yield Case("activation", text, 3 * n * INTERMEDIATE * SIZE, lambda d, n=n: _activation(d, n))
    for n in rows:
        moved = 2 * n * HIDDEN * SIZE
        yield Case("embedding", f"{n} of {VOCABULARY} x {HIDDEN}", moved, lambda d, n=n: _embedding(d, n))
    for n in rows[:3]:
        yield Case("gather", f"{n} rows of {HIDDEN}", 2 * n * HIDDEN * SIZE, lambda d, n=n: _gather(d, n))
    for seqs, tokens in ((1, 1), (64, 64), (512, 512), (512, 8192)):
        moved = 4 * (6 * seqs + 5 * tokens)
        yield Case(
            "prepare", f"{seqs} sequences, {tokens} tokens", moved, lambda d, s=seqs, t=tokens: _prepare(d, s, t)
        )


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE)


def _norm(device: torch.device, rows: int, normed_before: bool = False) -> Call:
    x, residual, weight = _random(device, rows, HIDDEN), _random(device, rows, HIDDEN), _random(device, HIDDEN)
    out = torch.empty_like(x)
    x_weight = _random(device, HIDDEN) if normed_before else None
    return lambda: norm(out, x, weight, eps=1e-5, residual=residual, x_weight=x_weight)


def _rope_kv(device: torch.device, tokens: int) -> Call:
    qkv = _random(device, tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    blocks = -(-tokens // BLOCK)
    k_cache, v_cache = (_random(device, blocks, KV_HEADS, BLOCK, HEAD_DIM) for _ in range(2))
    table = torch.randn(8192, HEAD_DIM, device=device)
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    slots = torch.arange(tokens, dtype=torch.int32, device=device)
    return lambda: rope_kv(
        qkv,
        k_cache,
        v_cache,
        table,
        positions,
        slots,
        q_heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rotary_dim=HEAD_DIM,
    )


def _activation(device: torch.device, rows: int) -> Call:
    x = _random(device, rows, 2 * INTERMEDIATE)
    out = torch.empty(rows, INTERMEDIATE, device=device, dtype=DTYPE)
    return lambda: activation(out, x, "silu", gated=True)


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    return _random(device, VOCABULARY, HIDDEN)


def _embedding(device: torch.device, rows: int) -> Call:
    table = _table(device)
    ids = torch.randint(0, table.shape[0], (rows,), dtype=torch.int32, device=device)
    out = torch.empty(rows, HIDDEN, device=device, dtype=DTYPE)
    return lambda: embedding(out, table, ids)


def _gather(device: torch.device, rows: int) -> Call:
    x, out = _random(device, 2 * rows, HIDDEN), torch.empty(rows, HIDDEN, device=device, dtype=DTYPE)
    index = torch.randperm(2 * rows, device=device)[:rows].to(torch.int32)
    return lambda: gather(out, x, index)


def _prepare(device: torch.device, seqs: int, tokens: int) -> Call:
    context = tokens // seqs + 1024
    step = StepTensors.allocate(seqs, tokens, seqs, context // BLOCK + 1, seqs, device)
    host = step.host()
    host.counts[: abi.NUM_SAMPLES + 1] = seqs, tokens, seqs
    host.seq_slot[:] = torch.randperm(seqs).numpy()
    host.q_start[:] = torch.linspace(0, tokens, seqs + 1).int().numpy()
    host.kv_len[:] = context
    host.host_ids[:] = -1
    host.sample_seq[:] = range(seqs)
    step.upload()
    return lambda: prepare(step, BLOCK)
