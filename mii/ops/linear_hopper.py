"""Products on a Hopper GPU by kernels of our own, where they are faster than cuBLASLt.

Up to 128 rows of a weight that has tiles for the multiprocessors, and gated products of many rows: warpgroup products
(csrc/include/mii/linear_wide.cuh). Up to 8 rows of other weights: a stream of the weight (linear_stream.cuh). Both read
the weight where it lies, row-major, so cuBLASLt serves all else from the same memory. The gated forms compute gate and
up of an output side by side and apply the activation before anything is written. Warpgroup products can also divide
a product evenly among the multiprocessors where whole tiles would leave some without work (SHARED_ROWS).
"""

from __future__ import annotations

import torch

from mii.ops import abi, native

STREAMED_ROWS = 8  # up to which a product goes to the stream, which takes no more
WIDE_TILES = 96  # of 128 weight rows, from which warpgroup products keep enough multiprocessors reading
WIDE_ROWS = 128  # up to which reading the weight is most of a product's time
# Gated products of more rows: from how many, and the least share of multiprocessors that have a tile in the last round.
GATED_ROWS, GATED_SHARE = 1024, 0.93
SHARED_ROWS = range(0)  # with which products that have no kernel by the lines above are divided evenly; up to 1,024
GATES = ("silu", "gelu_tanh", "gelu_quick")  # that warpgroup products apply
# Bytes of the following product's weight that come into the L2 cache while a product ends: about what memory delivers
# between the last read of one product and the first of the next.
FETCH_BYTES = 8 << 20

_workspaces: dict[tuple[torch.device, int], torch.Tensor] = {}


def prepare(device: torch.device) -> None:
    """Makes the memory that the kernels need on a device, so that no captured step has to."""
    library = native.library(device)
    if device.type == "cuda" and library is not None:
        _workspace(library, device)


def linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    following: torch.Tensor | None = None,
    activation: str | None = None,
) -> bool:
    """The product, or with an activation the gated product, of `mii.ops.linear`. False: not for these arguments."""
    if not x.is_cuda or x.shape[0] == 0 or activation not in (None, *abi.ACTIVATIONS):
        return False
    library = native.library(x.device)
    strided = x.stride(1) != 1 or out.stride(1) != 1 or not weight.is_contiguous()
    if library is None or strided or weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    function = _kernel(x.shape[0], weight.shape[0], activation, _multiprocessors(x.device))
    if function is None:
        return False
    product = abi.MiiLinear(
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        native.pointer(bias),
        x.shape[0],
        weight.shape[1],
        weight.shape[0],
        x.stride(0),
        out.stride(0),
        abi.DTYPE_CODES[weight.dtype],
        _workspace(library, x.device).data_ptr(),
    )
    args = abi.MiiLinearStreamed(
        product,
        *_ahead(following),
        FETCH_BYTES,
        activation is not None,
        abi.ACTIVATIONS.get(activation or "", 0),
    )
    return library.call(function, args, native.stream(x.device))


def _ahead(following: torch.Tensor | None) -> tuple[int | None, int]:
    """Where the following weight lies, and its bytes; nothing where it does not begin at whole 16 bytes, as a rank's
    part of an embedding of odd width may not.
    """
    if following is None or following.data_ptr() % 16:
        return None, 0
    return following.data_ptr(), following.numel() * following.element_size()


def _kernel(rows: int, features: int, activation: str | None, multiprocessors: int) -> str | None:
    """The function that multiplies so many rows by a weight of so many features; None: cuBLASLt does."""
    wide = activation is None or activation in GATES
    if wide and rows <= WIDE_ROWS and features >= 128 * WIDE_TILES:
        return "mii_linear_wide"
    if rows <= STREAMED_ROWS:
        return "mii_linear_streamed"
    if activation in GATES and rows >= GATED_ROWS:
        tiles = -(-rows // 128) * -(-features // 256)
        rounds = -(-tiles // multiprocessors)
        if tiles >= GATED_SHARE * rounds * multiprocessors:
            return "mii_linear_wide"
    return "mii_linear_shared" if wide and rows in SHARED_ROWS else None


def most_rows_without(rows: int, features: int, activation: str, multiprocessors: int) -> int:
    """The largest number of rows, up to `rows`, whose gated product has no kernel here."""
    without = (each for each in range(rows, 0, -1) if _kernel(each, features, activation, multiprocessors) is None)
    return next(without, 0)


def scratch_rows(rows: int, features: int, activation: str, dtype: torch.dtype, device: torch.device) -> int:
    """As `mii.ops.linear.scratch_rows`."""
    if device.type != "cuda" or native.library(device) is None or dtype not in (torch.float16, torch.bfloat16):
        return rows
    if torch.cuda.get_device_capability(device) != (9, 0):
        return rows
    return most_rows_without(rows, features, activation, _multiprocessors(device))


_multiprocessor_counts: dict[torch.device, int] = {}


def _multiprocessors(device: torch.device) -> int:
    if device not in _multiprocessor_counts:
        _multiprocessor_counts[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _multiprocessor_counts[device]


def _workspace(library: native.Library, device: torch.device) -> torch.Tensor:
    """Partial sums and their counters, one for each device: the calls of an engine follow one another in a stream."""
    key = device, SHARED_ROWS.stop
    if key not in _workspaces:
        size = library.bytes("mii_linear_workspace_bytes", abi.MiiLinear(rows=SHARED_ROWS.stop))
        _workspaces[key] = torch.zeros(size, dtype=torch.uint8, device=device)
    return _workspaces[key]
