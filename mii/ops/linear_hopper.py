"""Products on a Hopper GPU by kernels of our own, where they are faster than cuBLASLt.

Up to 128 rows of a weight that has tiles for the multiprocessors: warpgroup products
(csrc/include/mii/linear_wide.cuh); 17 to 64 rows where memory is so fast that the last tiles would leave it idle. Up to
8 rows of other weights, 16 where memory is fast: a stream of the weight (linear_stream.cuh). Both read the weight where
it lies, row-major, so cuBLASLt serves all else from the same memory. The gated forms compute gate and up of an output
side by side and apply the activation before anything is written.
"""

from __future__ import annotations

import functools

import torch

from mii.ops import abi, native

STREAMED_ROWS = 8  # up to which a product goes to the stream, which takes up to 16
WIDE_TILES = 96  # of 128 weight rows, from which warpgroup products keep enough multiprocessors reading
WIDE_ROWS = range(1, 129)  # for which reading the weight is most of a product's time
FAST_MEMORY = 100 << 30  # bytes: GPUs that have more have HBM3e, 4 TB/s and above
FAST_WIDE_ROWS = range(17, 65)  # of these: with fewer and more rows cuBLASLt is 2 % faster
FAST_STREAMED_ROWS = 16  # of these
FAST_STREAMED_FEATURES = 1 << 16  # of a weight, up to which so: at a head of more cuBLASLt is 4 to 6 % faster
GATES = ("silu", "gelu_tanh", "gelu_quick")  # that warpgroup products apply
# Bytes of the following product's weight that come into the L2 cache while a product ends: about what memory delivers
# between the last read of one product and the first of the next.
FETCH_BYTES = 8 << 20

_workspaces: dict[torch.device, torch.Tensor] = {}


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
    function = _kernel(x.shape[0], weight.shape[0], activation, _fast_memory(x.device))
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


def serves(weight: torch.Tensor, rows: int, activation: str | None) -> bool:
    """Whether `linear` is asked for products of so many rows at all; else cuBLASLt multiplies."""
    return _kernel(rows, weight.shape[0], activation, _fast_memory(weight.device)) is not None


def _kernel(rows: int, features: int, activation: str | None, fast_memory: bool) -> str | None:
    """The function that multiplies so many rows by a weight of so many features; None: cuBLASLt does."""
    tiled = features >= 128 * WIDE_TILES and (activation is None or activation in GATES)
    wide = tiled and rows in (FAST_WIDE_ROWS if fast_memory else WIDE_ROWS)
    more = fast_memory and rows <= FAST_STREAMED_ROWS and features <= FAST_STREAMED_FEATURES
    if (rows <= STREAMED_ROWS or more) and not wide:
        return "mii_linear_streamed"
    return "mii_linear_wide" if wide else None


@functools.cache
def _fast_memory(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).total_memory > FAST_MEMORY


def _workspace(library: native.Library, device: torch.device) -> torch.Tensor:
    """Partial sums and their counters, one for each device: the calls of an engine follow one another in a stream."""
    if device not in _workspaces:
        size = library.bytes("mii_linear_workspace_bytes", abi.MiiLinear())
        _workspaces[device] = torch.zeros(size, dtype=torch.uint8, device=device)
    return _workspaces[device]
