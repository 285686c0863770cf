"""Rotary position embedding, per-head norm of q and k, and the write of k and v into the paged cache, in one pass.

A row of qkv is [q heads | k heads | v heads], each head_dim wide. For each q and k head x, in float and rounded once:

    x = x * rsqrt(mean(x^2) + norm_eps) * weight    with q_norm / k_norm (abi.RMS_PLUS1: * (1 + weight); Qwen3, Gemma 3)
    x'[a] = x[a] cos - x[b] sin, x'[b] = x[b] cos + x[a] sin       for pairs (a, b) of the first rotary_dim dimensions

with pairs (i, i + rotary_dim/2), or (2i, 2i+1) when interleaved, where cos = cos_sin[position, i] and
sin = cos_sin[position, i + rotary_dim/2]. Dimensions past rotary_dim pass unchanged. q and k change in place; k and v
go to cache[slot // block_size, head, slot % block_size]. A kv slot of -1 writes nothing to the cache. Positions are
clamped to the table.
Su et al., 2021 (RoFormer); half-split pairs as in GPT-NeoX and Llama's Hugging Face layout.
"""

from __future__ import annotations

import torch

from mii.ops import abi, native


def rope_kv(
    qkv: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor,
    kv_slots: torch.Tensor | None,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_kind: int = abi.RMS,
) -> None:
    """Norms and rotates the q and k heads of each row in place and writes k and v into the cache.

    Args:
        qkv: [tokens, (q_heads + 2 kv_heads) * head_dim], rows may be strided.
        k_cache, v_cache: [blocks, kv_heads, block_size, head_dim], contiguous, block_size a power of two; or both None.
        cos_sin: [max_positions, rotary_dim] float32, cosines then sines; None: no rotation (NoPE, ALiBi).
        positions: [tokens] int32. kv_slots: [tokens] int32, block * block_size + offset or -1.
        q_norm, k_norm: [head_dim] in qkv's dtype, or None.
        norm_kind: abi.RMS or abi.RMS_PLUS1.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    check_rope_kv(qkv, k_cache, v_cache, cos_sin, positions, kv_slots, (q_heads, kv_heads, head_dim, rotary_dim))
    _check_norms(qkv, q_norm, k_norm, head_dim)
    library = native.library(qkv.device)
    dtype = abi.DTYPE_CODES.get(qkv.dtype)
    if library is not None and dtype is not None and library.has("mii_rope_kv"):
        args = abi.MiiRopeKv(
            qkv.data_ptr(),
            native.pointer(k_cache),
            native.pointer(v_cache),
            native.pointer(cos_sin),
            positions.data_ptr(),
            native.pointer(kv_slots),
            native.pointer(q_norm),
            native.pointer(k_norm),
            qkv.shape[0],
            qkv.stride(0),
            0 if cos_sin is None else cos_sin.shape[0],
            q_heads,
            kv_heads,
            head_dim,
            rotary_dim,
            interleaved,
            1 if k_cache is None else k_cache.shape[2],
            norm_eps,
            norm_kind,
            dtype,
        )
        if library.call("mii_rope_kv", args, native.stream(qkv.device)):
            return
    rope_kv_reference(
        qkv,
        k_cache,
        v_cache,
        cos_sin,
        positions,
        kv_slots,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        norm_kind=norm_kind,
    )


def check_rope_kv(
    qkv: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor,
    kv_slots: torch.Tensor | None,
    heads: tuple[int, int, int, int],
) -> None:
    """Raises ValueError where shapes or dtypes do not fit; `heads`: of queries, of keys, head_dim and rotary_dim."""
    q_heads, kv_heads, head_dim, rotary_dim = heads
    width = (q_heads + 2 * kv_heads) * head_dim
    if qkv.dim() != 2 or qkv.shape[1] != width or qkv.stride()[1] != 1:
        raise ValueError(
            f"rope_kv: qkv {tuple(qkv.shape)} must be [tokens, {width}], contiguous along a row, for {q_heads} query "
            f"and {kv_heads} key-value heads of {head_dim}"
        )
    if positions.shape[0] != qkv.shape[0] or positions.dtype != torch.int32:
        raise ValueError(
            f"rope_kv: positions {tuple(positions.shape)} {positions.dtype} must be [{qkv.shape[0]}] int32"
        )
    if cos_sin is not None and (
        cos_sin.shape[1] != rotary_dim or cos_sin.dtype != torch.float32 or rotary_dim % 2 or rotary_dim > head_dim
    ):
        raise ValueError(
            f"rope_kv: cos_sin {tuple(cos_sin.shape)} {cos_sin.dtype} must be [positions, {rotary_dim}] float32 with "
            f"an even rotary_dim of at most head_dim {head_dim}"
        )
    if k_cache is None or v_cache is None or kv_slots is None:
        if not (k_cache is None and v_cache is None):
            raise ValueError("rope_kv: k_cache, v_cache and kv_slots go together; give all three, or no cache")
        return
    if kv_slots.shape[0] != qkv.shape[0] or kv_slots.dtype != torch.int32:
        raise ValueError(f"rope_kv: kv_slots {tuple(kv_slots.shape)} {kv_slots.dtype} must be [{qkv.shape[0]}] int32")
    shape, dtype = k_cache.shape, qkv.dtype
    if (
        v_cache.shape != shape
        or shape[1] != kv_heads
        or shape[3] != head_dim
        or k_cache.dtype != dtype
        or v_cache.dtype != dtype
    ):
        raise ValueError(
            f"rope_kv: caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)} {k_cache.dtype} must both be "
            f"[blocks, {kv_heads}, block_size, {head_dim}] in qkv's dtype {qkv.dtype}"
        )


def _check_norms(qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, head_dim: int) -> None:
    for weight in (q_norm, k_norm):
        if weight is not None and (weight.shape != (head_dim,) or weight.dtype != qkv.dtype):
            raise ValueError(
                f"rope_kv: a head norm's weight {tuple(weight.shape)} {weight.dtype} must be [{head_dim}] {qkv.dtype}"
            )


def rope_kv_reference(
    qkv: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor,
    kv_slots: torch.Tensor | None,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_kind: int = abi.RMS,
) -> None:
    """`rope_kv` in plain torch."""
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split((q_heads, kv_heads, kv_heads), dim=1)
    table = None
    if cos_sin is not None:
        table = cos_sin[positions.clamp(0, cos_sin.shape[0] - 1)][:, None]  # [tokens, 1, rotary_dim]
    for heads, weight in ((q, q_norm), (k, k_norm)):
        value = heads.to(torch.promote_types(qkv.dtype, torch.float32))
        if weight is not None:
            factor = weight.to(value.dtype) + (1.0 if norm_kind == abi.RMS_PLUS1 else 0.0)
            value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + norm_eps) * factor
        if table is not None:
            value = torch.cat((_rotated(value[..., :rotary_dim], table, interleaved), value[..., rotary_dim:]), dim=-1)
        heads.copy_(value)
    if k_cache is None or v_cache is None or kv_slots is None:
        return
    kept = kv_slots >= 0
    slots = kv_slots[kept].long()
    block, offset = slots // k_cache.shape[2], slots % k_cache.shape[2]
    k_cache[block, :, offset] = k[kept]
    v_cache[block, :, offset] = v[kept]


def _rotated(x: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = table[..., :half], table[..., half:]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
