"""Row gather: the rows that a step samples from, before the last matrix product.

out[r] = x[index[r]]
"""

from __future__ import annotations

import torch

from mii.ops import abi, native


def gather(out: torch.Tensor, x: torch.Tensor, index: torch.Tensor) -> None:
    """Copies the rows of x that index names.

    Args:
        out: [rows, width], contiguous. x: [any, width], rows may be strided, out's dtype.
        index: [rows] int32, each a row of x (not checked).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if out.shape != (index.shape[0], x.shape[1]) or out.dtype != x.dtype or index.dtype != torch.int32:
        raise ValueError(
            f"gather: out {tuple(out.shape)} {out.dtype} must be [rows, width] like x {tuple(x.shape)} {x.dtype}, one "
            f"row for each int32 index, given {tuple(index.shape)} {index.dtype}"
        )
    if x.stride()[1] != 1 or not out.is_contiguous():
        raise ValueError("gather: out must be contiguous and x contiguous along a row")
    library = native.library(x.device)
    dtype = abi.DTYPE_CODES.get(x.dtype)
    if library is not None and dtype is not None and library.has("mii_gather"):
        args = abi.MiiGather(
            out.data_ptr(), x.data_ptr(), index.data_ptr(), index.shape[0], x.shape[1], x.stride(0), dtype
        )
        if library.call("mii_gather", args, native.stream(x.device)):
            return
    gather_reference(out, x, index)


def gather_reference(out: torch.Tensor, x: torch.Tensor, index: torch.Tensor) -> None:
    """`gather` in plain torch."""
    torch.index_select(x, 0, index, out=out)
