"""Batches for the tests of decode attention: those of attention, without keys and values of the step's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mii.ops.attention import AttentionPlan
from mii.ops.decode_attention import decode_attention
from mii.ops.rope_kv import rope_kv, rope_kv_reference
from tests.ops.attention_cases import Case, Shape, make_case

TABLE_ROWS = 700  # of angles; positions past them are clamped


@dataclass
class DecodeCase:
    """A batch, and what rotates and stores its tokens."""

    case: Case
    cos_sin: torch.Tensor | None
    positions: torch.Tensor
    kv_slots: torch.Tensor

    def stored(self, *, reference: bool = False) -> Case:
        """The case as rope_kv leaves it: queries rotated, keys and values in the cache."""
        case, shape = self.case, self.case.shape
        qkv, k_cache, v_cache = case.qkv.clone(), case.k_cache.clone(), case.v_cache.clone()
        heads = {"q_heads": shape.q_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
        rotate = rope_kv_reference if reference else rope_kv
        rotate(qkv, k_cache, v_cache, self.cos_sin, self.positions, self.kv_slots, **heads, rotary_dim=shape.head_dim)
        q = qkv[:, : case.q.shape[1]]
        return Case(case.shape, case.lengths, case.batch, q, k_cache, v_cache, case.alibi_slopes, case.scale, qkv)

    def run(self, plan: AttentionPlan | None = None) -> torch.Tensor:
        """By the operation; writes the case's caches."""
        case, plan = self.case, plan or self.case.plan()
        plan.update(case.batch)
        out = case.new_out()
        tensors = (case.k_cache, case.v_cache, self.cos_sin, self.positions, self.kv_slots)
        decode_attention(out, case.qkv, *tensors, case.batch, plan, **case.options())  # type: ignore[arg-type]
        return out


def make_decode_case(
    contexts: list[int], shape: Shape, *, seed: int = 0, rotates: bool = True, shift: int = 0, **bounds: int
) -> DecodeCase:
    """A token for each sequence of so many tokens after the step (0: none of it), whose own place in the cache is NaN.

    Rows of the table of angles lie `shift` past the positions.
    """
    case = make_case([(min(1, context), context) for context in contexts], shape, seed=seed, **bounds)
    kept = [context for context in contexts if context]
    rows, size = len(case.qkv), shape.block_size
    positions, slots = torch.zeros(rows, dtype=torch.int32), torch.full((rows,), -1, dtype=torch.int32)
    positions[: len(kept)] = torch.tensor(kept) - 1
    owners = [int(slot) for slot, context in zip(case.batch.seq_slot, contexts, strict=False) if context]
    for row, (owner, context) in enumerate(zip(owners, kept, strict=True)):
        block = int(case.batch.block_table[owner, (context - 1) // size])
        slots[row] = block * size + (context - 1) % size
        for cache in (case.k_cache, case.v_cache):
            cache[block, :, (context - 1) % size] = torch.nan
    angles = torch.rand(TABLE_ROWS, shape.head_dim // 2, generator=torch.Generator().manual_seed(seed)) * 6.3
    table = torch.cat((angles.cos(), angles.sin()), dim=1).to(shape.device) if rotates else None
    return DecodeCase(case, table, (positions + shift).to(shape.device), slots.to(shape.device))


def bits(x: torch.Tensor) -> torch.Tensor:
    """For comparisons in which NaN equals itself."""
    return x.contiguous().view(torch.int16)


# A context of one token; around a warp's step, a tile and a block; longer than the ring; none at all.
CONTEXTS = [1, 15, 16, 17, 0, 48, 49, 63, 64, 65, 2, 128, 129, 200, 331, 80]
