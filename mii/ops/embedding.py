"""Token embedding, with learned positions where a family has them.

    out[r] = scale * table[ids[r]] + position_table[positions[r] + position_offset]

computed in float and rounded once. An id outside the table counts as a row of zeros (so a shard of a vocabulary can be
looked up with shifted ids); positions are clamped to the position table.
"""

from __future__ import annotations

import torch

from mii.ops import abi, native


def embedding(
    out: torch.Tensor,
    table: torch.Tensor,
    ids: torch.Tensor,
    *,
    scale: float = 1.0,
    position_table: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    position_offset: int = 0,
) -> None:
    """Looks up a row for each id.

    Args:
        out: [rows, width], contiguous, the table's dtype.
        table: [vocab, width], contiguous.
        ids: [rows] int32.
        scale: factor of the token's row (Gemma: sqrt(width), rounded to the dtype by the caller).
        position_table: [max_positions, width], contiguous, with `positions` [rows] int32: added (GPT-2, OPT).
        position_offset: added to each position (OPT: 2).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check(out, table, ids, position_table, positions)
    library = native.library(table.device)
    dtype = abi.DTYPE_CODES.get(table.dtype)
    if library is not None and dtype is not None and library.has("mii_embedding"):
        args = abi.MiiEmbedding(
            out.data_ptr(),
            table.data_ptr(),
            ids.data_ptr(),
            native.pointer(position_table),
            native.pointer(positions),
            ids.shape[0],
            table.shape[1],
            table.shape[0],
            0 if position_table is None else position_table.shape[0],
            position_offset,
            scale,
            dtype,
        )
        if library.call("mii_embedding", args, native.stream(table.device)):
            return
    embedding_reference(
        out,
        table,
        ids,
        scale=scale,
        position_table=position_table,
        positions=positions,
        position_offset=position_offset,
    )


def _check(
    out: torch.Tensor,
    table: torch.Tensor,
    ids: torch.Tensor,
    position_table: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> None:
    if out.shape != (ids.shape[0], table.shape[1]) or out.dtype != table.dtype or ids.dtype != torch.int32:
        raise ValueError(
            f"embedding: out {tuple(out.shape)} {out.dtype} must be [rows, width] in the dtype of the table "
            f"{tuple(table.shape)} {table.dtype}, one row for each int32 id, given {tuple(ids.shape)} {ids.dtype}"
        )
    if not (out.is_contiguous() and table.is_contiguous() and ids.is_contiguous()):
        raise ValueError("embedding: out, table and ids must be contiguous")
    if position_table is None:
        return
    if positions is None or positions.shape != ids.shape or positions.dtype != torch.int32:
        raise ValueError("embedding: a position table needs positions, int32, one for each id")
    if position_table.shape[1] != table.shape[1] or position_table.dtype != table.dtype:
        raise ValueError(
            f"embedding: position table {tuple(position_table.shape)} {position_table.dtype} must be as wide as the "
            f"table {tuple(table.shape)} and of its dtype {table.dtype}"
        )


def embedding_reference(
    out: torch.Tensor,
    table: torch.Tensor,
    ids: torch.Tensor,
    *,
    scale: float = 1.0,
    position_table: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    position_offset: int = 0,
) -> None:
    """`embedding` in plain torch."""
    wide = torch.promote_types(table.dtype, torch.float32)
    inside = (ids >= 0) & (ids < table.shape[0])
    rows = table[ids.clamp(0, table.shape[0] - 1)].to(wide) * scale
    rows = torch.where(inside[:, None], rows, 0.0)
    if position_table is not None and positions is not None:
        index = (positions + position_offset).clamp(0, position_table.shape[0] - 1)
        rows = rows + position_table[index].to(wide)
    out.copy_(rows)
