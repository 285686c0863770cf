"""Batches for the attention tests: random sequences in a cache whose every other element is NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mii.ops import abi
from mii.ops.attention import AttentionBatch, AttentionPlan, attention_reference

SENTINEL = 12345.0  # what rows hold that nobody may write
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}


@dataclass(frozen=True)
class Shape:
    """Everything of a case but the lengths."""

    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    device: str = "cpu"

    def with_(self, **changes: object) -> Shape:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass
class Case:
    """A batch and its tensors; `lengths` holds (query tokens, tokens after the step) of each sequence."""

    shape: Shape
    lengths: list[tuple[int, int]]
    batch: AttentionBatch
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    alibi_slopes: torch.Tensor | None
    scale: float
    qkv: torch.Tensor  # rows [q | k | v], of which q is a part

    @property
    def rows(self) -> int:
        return sum(q for q, _ in self.lengths)

    def options(self) -> dict[str, object]:
        return {"scale": self.scale, "softcap": self.shape.softcap, "alibi_slopes": self.alibi_slopes}

    def new_out(self) -> torch.Tensor:
        return torch.full_like(self.q, SENTINEL)

    def plan(self) -> AttentionPlan:
        s = self.shape
        return AttentionPlan(
            q_heads=s.q_heads, kv_heads=s.kv_heads, head_dim=s.head_dim, block_size=s.block_size, dtype=s.dtype,
            max_seqs=self.batch.max_seqs, max_tokens=self.batch.max_tokens, window=s.window, device=s.device,
            max_blocks=self.batch.block_table.shape[1],
        )  # fmt: skip

    def run_native(self, plan: AttentionPlan | None = None) -> torch.Tensor:
        """The native library's answer; fails where it has no kernel for the case."""
        plan = self.plan() if plan is None else plan
        plan.update(self.batch)
        out = self.new_out()
        slopes, softcap = self.alibi_slopes, self.shape.softcap
        assert plan.run(out, self.q, self.k_cache, self.v_cache, slopes, self.scale, softcap), "no native kernel"
        return out

    def reference(self) -> torch.Tensor:
        """The plain torch answer in float32."""
        out = self.new_out().float()
        attention_reference(
            out, self.q, self.k_cache, self.v_cache, self.batch, window=self.shape.window, **self.options()
        )  # type: ignore[arg-type]
        return out

    def check(self, out: torch.Tensor) -> None:
        """Rows within rounding of the reference, all others untouched."""
        assert bool((out[self.rows :] == SENTINEL).all()), "rows of padding were written"
        got, expected = out[: self.rows].float(), self.reference()[: self.rows]
        assert bool(got.isfinite().all()), f"NaN or infinity in rows {_bad_rows(~got.isfinite())}"
        tolerance = TOLERANCE[self.shape.dtype]
        bad = (got - expected).abs() > tolerance * (1 + expected.abs())
        assert not bool(bad.any()), f"off by up to {(got - expected).abs().max():.3g} in rows {_bad_rows(bad)}"


def _bad_rows(bad: torch.Tensor) -> list[int]:
    return bad.flatten(1).any(1).nonzero().flatten().tolist()[:20]


def make_case(
    lengths: list[tuple[int, int]],
    shape: Shape,
    *,
    seed: int = 0,
    max_seqs: int | None = None,
    max_tokens: int | None = None,
    max_blocks: int | None = None,
) -> Case:
    """Random queries, keys and values for `lengths`; the bounds default to a little more than those need.

    What no query of a sequence may see is NaN: free blocks, slots past the last token, tokens before the window.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = sum(q for q, _ in lengths)
    max_seqs = max_seqs or len(lengths) + 3
    max_tokens = max_tokens or rows + 5
    counts = [-(-kv // shape.block_size) for _, kv in lengths]
    max_blocks = max_blocks or max([*counts, 1]) + 2
    table = torch.zeros(max_seqs + 4, max_blocks, dtype=torch.int32)  # block 0 is free: all NaN
    blocks = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    cache_shape = (len(blocks) + 2, shape.kv_heads, shape.block_size, shape.head_dim)
    caches = [torch.full(cache_shape, torch.nan) for _ in range(2)]
    slots = torch.randperm(max_seqs + 4, generator=generator)[:max_seqs].int()
    for s, (q_len, kv_len) in enumerate(lengths):
        first = max(0, kv_len - q_len - shape.window + 1) if shape.window > 0 else 0
        for i in range(counts[s]):
            block, start = blocks.pop(), i * shape.block_size
            seen = slice(max(0, first - start), min(shape.block_size, kv_len - start))
            if seen.start >= seen.stop:
                continue
            table[slots[s], i] = block
            for cache in caches:
                values = torch.randn(shape.kv_heads, seen.stop - seen.start, shape.head_dim, generator=generator)
                cache[block, :, seen] = values
    width = shape.q_heads * shape.head_dim
    fused = torch.randn(max_tokens, width + 2 * shape.kv_heads * shape.head_dim, generator=generator)
    q_start = torch.full((max_seqs + 1,), 1 << 30, dtype=torch.int32)
    q_start[: len(lengths) + 1] = torch.tensor([0] + [q for q, _ in lengths]).cumsum(0)
    kv_len = torch.full((max_seqs,), 1 << 30, dtype=torch.int32)
    kv_len[: len(lengths)] = torch.tensor([kv for _, kv in lengths])
    step = torch.zeros(abi.COUNTS, dtype=torch.int32)
    step[abi.NUM_SEQS], step[abi.NUM_TOKENS] = len(lengths), rows
    batch = AttentionBatch(
        *(t.to(shape.device) for t in (step, slots, q_start, kv_len, table)), max_seqs=max_seqs, max_tokens=max_tokens
    )
    slopes = torch.linspace(0.02, 0.6, shape.q_heads, device=shape.device) if shape.alibi else None
    k_cache, v_cache = (cache.to(shape.dtype).to(shape.device) for cache in caches)
    qkv = fused.to(shape.dtype).to(shape.device)
    return Case(shape, lengths, batch, qkv[:, :width], k_cache, v_cache, slopes, shape.head_dim**-0.5, qkv)


def struct_of(case: Case, out: torch.Tensor) -> abi.MiiAttention:
    """The arguments of a kernel that computes `out`, but for the work list and the scratch memory."""
    shape, batch = case.shape, case.batch
    return abi.MiiAttention(
        out=out.data_ptr(), q=case.q.data_ptr(), k_cache=case.k_cache.data_ptr(), v_cache=case.v_cache.data_ptr(),
        counts=batch.counts.data_ptr(), seq_slot=batch.seq_slot.data_ptr(), q_start=batch.q_start.data_ptr(),
        kv_len=batch.kv_len.data_ptr(), block_table=batch.block_table.data_ptr(),
        alibi_slopes=case.alibi_slopes.data_ptr() if case.alibi_slopes is not None else None,
        max_seqs=batch.max_seqs, max_tokens=batch.max_tokens, max_blocks=batch.block_table.shape[1],
        num_blocks=case.k_cache.shape[0], q_stride=case.q.stride(0), out_stride=out.stride(0), q_heads=shape.q_heads,
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, block_size=shape.block_size, window=shape.window,
        scale=case.scale, softcap=shape.softcap, dtype=abi.DTYPE_CODES[shape.dtype],
    )  # fmt: skip


def edge_lengths(block_size: int) -> dict[str, list[tuple[int, int]]]:
    """Lengths around every border: decode, prompts, chunks of prompts, all of them in one step."""
    b = block_size
    decode = [(1, 1), (1, b - 1), (0, 0), (1, b), (1, b + 1), (1, 65), (1, 3 * b + 5), (0, 7), (1, 200)]
    prompts = [(1, 1), (b - 1, b - 1), (b, b), (b + 1, b + 1), (0, 0), (70, 70), (2, 2)]
    chunks = [(5, b + 5), (b, 3 * b), (33, 150), (2, 100), (17, 18), (64, 64)]
    return {
        "nothing": [],
        "one token": [(1, 1)],
        "decode": decode,
        "long decode": [(1, 700), (1, 3)],
        "prompts": prompts,
        "chunks": chunks,
        "mixed": [decode[6], chunks[2], decode[1], prompts[5], (0, 0), chunks[0], decode[8], chunks[3]],
    }
