"""Causal attention of ragged query rows over the paged KV cache: prompts, chunks of them and single tokens in one call.

`AttentionPlan.update` runs once a step and builds the work list on the device; `attention` then runs for every layer.
Both read the lengths from device memory only, so one captured CUDA graph serves every batch within its bounds.

    score(t, k) = scale * q_t . k_k;  with softcap c > 0: c * tanh(score / c);  with ALiBi: + slope * (k - p)
    out(t)      = sum_k softmax(score)(t, k) * v_k   over the keys max(0, p - window + 1) .. p, p the position of t

Sources: FlashAttention (Dao, 2022 and 2023) for the tiles and the running softmax, Flash-Decoding (Dao and others,
2023) for the split over keys, PagedAttention (Kwon and others, 2023) for the block table.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mii.ops import abi, native

_REFERENCE_ROWS = 256  # query rows at a time, which bounds the reference's score matrix


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """What one step attends to; every tensor is int32 on the device of the cache.

    Sequence s feeds the query rows q_start[s] .. q_start[s + 1]; its keys are the kv_len[s] tokens whose cache blocks
    row seq_slot[s] of block_table lists, the query tokens being the last of them.

    Args:
        counts: [abi.COUNTS]; only [abi.NUM_SEQS], how many sequences the step has, is read.
        seq_slot: [max_seqs] row of block_table.
        q_start: [max_seqs + 1] first query row of each sequence.
        kv_len: [max_seqs] tokens of each sequence after this step.
        block_table: [slots, max_blocks] cache blocks in order of their tokens.
        max_seqs: upper bound of the sequences in a step (the bucket's size).
        max_tokens: upper bound of the query rows in a step.
    """

    counts: torch.Tensor
    seq_slot: torch.Tensor
    q_start: torch.Tensor
    kv_len: torch.Tensor
    block_table: torch.Tensor
    max_seqs: int
    max_tokens: int


class AttentionPlan:
    """The work list and the scratch memory of attention for one shape of heads and one window.

    Made once; `update` runs once a step, before the first layer. Layers that differ in their window need a plan each.

    Args:
        q_heads, kv_heads: heads of queries and of the cache; q_heads is a multiple of kv_heads.
        head_dim: elements of one head.
        block_size: tokens of one cache block, a power of two from 16 to 128.
        max_seqs, max_tokens: the largest bounds of any batch that `update` will get.
        max_blocks: width of the block table.
        dtype: of queries, cache and result: torch.float16, torch.bfloat16 or torch.float32.
        device: where all of them lie.
        window: keys that a query sees, itself included; 0: all.

    Raises:
        ValueError: an argument is out of range; the message says what is allowed.
    """

    def __init__(
        self,
        *,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        max_seqs: int,
        max_tokens: int,
        max_blocks: int,
        dtype: torch.dtype,
        device: torch.device | str,
        window: int = 0,
    ) -> None:
        _check_shape(q_heads, kv_heads, block_size, dtype)
        self.q_heads, self.kv_heads, self.head_dim = q_heads, kv_heads, head_dim
        self.block_size, self.window = block_size, max(0, window)
        self.block_shape = torch.Size((kv_heads, block_size, head_dim))
        self.max_seqs, self.max_tokens = max_seqs, max_tokens
        self.dtype, self.device = dtype, torch.device(device)
        self.batch: AttentionBatch | None = None
        self.planned = False  # whether `work` holds the list of the current batch
        self._args = abi.MiiAttention(
            q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, window=self.window,
            max_seqs=max_seqs, max_tokens=max_tokens, max_blocks=max_blocks, dtype=abi.DTYPE_CODES[dtype],
        )  # fmt: skip
        self.work = self._buffer("mii_attention_work_bytes")
        self.workspace = self._buffer("mii_attention_workspace_bytes")
        self._args.work, self._args.workspace = self.work.data_ptr(), self.workspace.data_ptr()

    def _buffer(self, size_function: str) -> torch.Tensor:
        library = native.library(self.device)
        size = library.bytes(size_function, self._args) if library is not None and library.has(size_function) else 0
        return torch.zeros(max(size, 16), dtype=torch.uint8, device=self.device)

    def update(self, batch: AttentionBatch) -> None:
        """Builds the work list of a batch on the current stream; `attention` with the same batch may follow.

        Keys and values of earlier steps have to lie in the cache by now: on a GPU `attention` reads them before the
        kernel before it has ended, and waits for those of the batch's own tokens alone.

        Raises:
            ValueError: the batch is larger than the plan's bounds.
        """
        if batch.max_seqs > self.max_seqs or batch.max_tokens > self.max_tokens:
            raise ValueError(
                f"The batch may have {batch.max_seqs} sequences and {batch.max_tokens} tokens, the attention plan was "
                f"made for {self.max_seqs} and {self.max_tokens}: make the plan with larger bounds."
            )
        self.batch = batch
        args = self._args
        args.counts, args.seq_slot = batch.counts.data_ptr(), batch.seq_slot.data_ptr()
        args.q_start, args.kv_len = batch.q_start.data_ptr(), batch.kv_len.data_ptr()
        args.block_table, args.max_blocks = batch.block_table.data_ptr(), batch.block_table.shape[1]
        args.max_seqs, args.max_tokens = batch.max_seqs, batch.max_tokens
        self.planned = self._call("mii_attention_plan")

    def run(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        alibi_slopes: torch.Tensor | None,
        scale: float,
        softcap: float,
    ) -> bool:
        """One layer by the native library; False: it has no kernel for this, the reference must serve."""
        if not self.planned:
            return False
        self.arguments(out, q, k_cache, v_cache, alibi_slopes, scale, softcap)
        return self._call("mii_attention")

    def arguments(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        alibi_slopes: torch.Tensor | None,
        scale: float,
        softcap: float,
    ) -> ctypes.Structure:
        """The struct of one layer's call; the next layer's is the same object."""
        args = self._args
        args.out, args.q = out.data_ptr(), q.data_ptr()
        args.out_stride, args.q_stride = out.stride(0), q.stride(0)
        args.k_cache, args.v_cache, args.num_blocks = k_cache.data_ptr(), v_cache.data_ptr(), k_cache.shape[0]
        args.alibi_slopes, args.scale, args.softcap = native.pointer(alibi_slopes), scale, softcap
        return args

    def _call(self, name: str) -> bool:
        library = native.library(self.device)
        if library is None or not library.has(name):
            return False
        return library.call(name, self._args, native.stream(self.device))


def attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    plan: AttentionPlan,
    *,
    scale: float,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> None:
    """Attention of one layer (see the module's head for the equation).

    Rows of `out` past the step's query tokens keep what they hold, and so do those of sequences without keys.

    Args:
        out: [rows, q_heads * head_dim] (or [rows, q_heads, head_dim]), rows may be strided.
        q: the same shape and dtype; a slice of the fused qkv rows is fine.
        k_cache, v_cache: [num_blocks, kv_heads, block_size, head_dim], contiguous, holding the step's keys already.
        batch: the batch that `plan.update` got last.
        plan: work list and scratch memory.
        scale: factor on q . k, commonly head_dim ** -0.5.
        softcap: bound c of c * tanh(score / c); 0: none.
        alibi_slopes: [q_heads] float32, or None.

    Raises:
        ValueError: a shape, stride or dtype does not fit, or the plan was not updated with this batch.
    """
    check_attention(out, q, k_cache, v_cache, batch, plan, alibi_slopes)
    if not plan.run(out, q, k_cache, v_cache, alibi_slopes, scale, softcap):
        attention_reference(
            out, q, k_cache, v_cache, batch, scale=scale, window=plan.window, softcap=softcap, alibi_slopes=alibi_slopes
        )


def attention_reference(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> None:
    """The same in plain torch, reading the lengths on the host: gathers each sequence's pages, computes in float32."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    q = q.unflatten(1, (-1, head_dim)) if q.dim() == 2 else q
    out = out.unflatten(1, (-1, head_dim)) if out.dim() == 2 else out
    slopes = None if alibi_slopes is None else alibi_slopes.float().view(kv_heads, -1, 1, 1)
    for rows, first_position, table in _row_blocks(batch):
        positions = torch.arange(first_position, first_position + rows.stop - rows.start, device=q.device)
        first_key = max(0, first_position - window + 1) if window > 0 else 0
        keys = torch.arange(first_key, first_position + positions.numel(), device=q.device)
        k, v = (_gather_tokens(cache, table, keys) for cache in (k_cache, v_cache))
        queries = q[rows].float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, group, rows, head_dim]
        scores = scale * (queries @ k.unsqueeze(1).transpose(-1, -2))
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        distance = keys - positions.unsqueeze(1)
        if slopes is not None:
            scores = scores + slopes * distance
        hidden = (distance > 0) | (distance <= -window) if window > 0 else distance > 0
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[rows] = (weights @ v.unsqueeze(1)).permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)


def _row_blocks(batch: AttentionBatch) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """(query rows, position of the first, row of the block table) of each sequence, some rows at a time."""
    count = int(batch.counts[abi.NUM_SEQS])
    starts, lengths = batch.q_start[: count + 1].tolist(), batch.kv_len[:count].tolist()
    for s, slot in enumerate(batch.seq_slot[:count].tolist()):
        if lengths[s] == 0:
            continue
        shift = lengths[s] - starts[s + 1]  # position of a query token minus its row
        for row in range(starts[s], starts[s + 1], _REFERENCE_ROWS):
            end = min(row + _REFERENCE_ROWS, starts[s + 1])
            yield slice(row, end), row + shift, batch.block_table[slot]


def _gather_tokens(cache: torch.Tensor, table: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[kv_heads, len(keys), head_dim] in float32 of a sequence's tokens `keys`."""
    block_size = cache.shape[2]
    blocks = table.index_select(0, keys // block_size).long()
    return cache[blocks, :, keys % block_size].transpose(0, 1).float()


def _check_shape(q_heads: int, kv_heads: int, block_size: int, dtype: torch.dtype) -> None:
    if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads cannot share {kv_heads} KV heads: give a multiple of the KV heads.")
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"A KV block of {block_size} tokens is not supported: give 16, 32, 64 or 128.")
    if dtype not in abi.DTYPE_CODES:
        raise ValueError(f"Attention in {dtype} is not supported: use torch.float16, torch.bfloat16 or torch.float32.")


def check_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    plan: AttentionPlan,
    alibi_slopes: torch.Tensor | None,
) -> None:
    """Raises ValueError where the tensors do not fit the plan, or it holds another batch."""
    if plan.batch is not batch:
        raise ValueError("The attention plan holds another batch: call plan.update(batch) before attention().")
    width, dtype = plan.q_heads * plan.head_dim, plan.dtype
    for name, rows in (("out", out), ("q", q)):
        if not _are_rows(rows, width, plan.head_dim):
            raise ValueError(
                f"{name} has shape {tuple(rows.shape)} and strides {rows.stride()}: give rows of {plan.q_heads} heads "
                f"x {plan.head_dim} elements, each row contiguous."
            )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[1:] != plan.block_shape or not cache.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(cache.shape)}: give a contiguous tensor [num_blocks, {plan.kv_heads} heads, "
                f"{plan.block_size} tokens, {plan.head_dim}]."
            )
    if not (out.dtype == q.dtype == k_cache.dtype == v_cache.dtype == dtype):
        raise ValueError(f"out, q, k_cache and v_cache must all be {dtype}, the dtype that the plan was made for.")
    if alibi_slopes is not None and (alibi_slopes.dtype != torch.float32 or alibi_slopes.numel() != plan.q_heads):
        raise ValueError(f"alibi_slopes must be {plan.q_heads} float32 values, one per query head.")


def _are_rows(rows: torch.Tensor, width: int, head_dim: int) -> bool:
    if rows.dim() == 2:
        return rows.shape[1] == width and rows.stride(1) == 1
    return rows.dim() == 3 and rows.shape[1:].numel() == width and rows.stride()[1:] == (head_dim, 1)
