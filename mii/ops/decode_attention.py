"""Rotation, KV write and attention in one, for steps in which every sequence has one query token or none.

    rope_kv(qkv, k_cache, v_cache, cos_sin, positions, kv_slots, ...); attention(out, q of qkv, ...)

with half-split pairs over the whole head, and without norms: see `mii.ops.rope_kv` and `mii.ops.attention`, whose
results these are, bit for bit. Where a kernel does it in one launch, queries and new keys are rotated in its registers;
else the two operations follow one another.

No sequence may see a key that another one writes in the same step, as it can where prompts share blocks.
"""

from __future__ import annotations

import torch

from mii.ops import abi, native
from mii.ops.attention import AttentionBatch, AttentionPlan, attention, check_attention
from mii.ops.rope_kv import check_rope_kv, rope_kv


def decode_attention(
    out: torch.Tensor,
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    batch: AttentionBatch,
    plan: AttentionPlan,
    *,
    scale: float,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> None:
    """The new keys and values into the cache, and one layer's attention.

    Args:
        out: [rows, q_heads * head_dim], rows may be strided; rows without a sequence keep what they hold.
        qkv: [rows, (q_heads + 2 kv_heads) * head_dim], rows may be strided; queries and keys may be rotated afterwards.
        k_cache, v_cache: [num_blocks, kv_heads, block_size, head_dim], contiguous, holding the keys of earlier steps.
        cos_sin: [max_positions, head_dim] float32, cosines then sines; None: no rotation.
        positions: [rows] int32 row of cos_sin, clamped to it.
        kv_slots: [rows] int32 block * block_size + offset of the place of each token in the block table, or -1 for rows
            without a sequence.
        batch: the batch that `plan.update` got last. Positions and slots were there by then: on a GPU they are read
            before the kernel before has ended.
        plan: work list and scratch memory.
        scale, softcap, alibi_slopes: as for `attention`.

    Raises:
        ValueError: a shape, stride or dtype does not fit, or the plan was not updated with this batch.
    """
    queries, heads = qkv[:, : plan.q_heads * plan.head_dim], (plan.q_heads, plan.kv_heads, plan.head_dim)
    library = native.library(plan.device)
    if plan.planned and library is not None and library.has("mii_decode_attention"):
        check_attention(out, queries, k_cache, v_cache, batch, plan, alibi_slopes)
        check_rope_kv(qkv, k_cache, v_cache, cos_sin, positions, kv_slots, (*heads, plan.head_dim))
        args = abi.MiiDecodeAttention(
            plan.arguments(out, queries, k_cache, v_cache, alibi_slopes, scale, softcap),
            native.pointer(cos_sin),
            positions.data_ptr(),
            kv_slots.data_ptr(),
            0 if cos_sin is None else cos_sin.shape[0],
        )
        if library.call("mii_decode_attention", args, native.stream(plan.device)):
            return
    rope_kv(
        qkv,
        k_cache,
        v_cache,
        cos_sin,
        positions,
        kv_slots,
        q_heads=plan.q_heads,
        kv_heads=plan.kv_heads,
        head_dim=plan.head_dim,
        rotary_dim=plan.head_dim,
    )
    attention(out, queries, k_cache, v_cache, batch, plan, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes)
