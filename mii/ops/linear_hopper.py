"""Products on a Hopper GPU by kernels of our own, where they are faster than cuBLASLt.

Up to 128 rows of a weight that has tiles for the multiprocessors: warpgroup products
(csrc/include/mii/linear_wide.cuh); 17 to 64 rows where memory is so fast that the last tiles would leave it idle. Up to
8 rows of other weights, 16 where memory is fast: a stream of the weight (linear_stream.cuh). Both read the weight where
it lies, row-major, so cuBLASLt serves all else from the same memory. The gated forms compute gate and up of an output
side by side and apply the activation before anything is written. Of weights with few tiles warpgroup products leave
parts of their sums to the norm that follows (`parts`).
"""

from __future__ import annotations

import ctypes
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

PARTED_ROWS = range(17, 65)  # of which parts are left where memory is fast: with more cuBLASLt is 1 % faster
PARTED_SHARE = 0.8  # of the multiprocessors, from which pieces of a weight keep enough of them reading
MOST_PARTS = 8  # a norm reads so many rows for one; four were measured

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
    library = _library(out, x, weight)
    if library is None or activation not in (None, *abi.ACTIVATIONS):
        return False
    function = _kernel(x.shape[0], weight.shape[0], activation, _fast_memory(x.device))
    if function is None:
        return False
    args = _arguments(library, out, x, weight, bias, following)
    args.gated, args.activation = activation is not None, abi.ACTIVATIONS.get(activation or "", 0)
    return library.call(function, args, native.stream(x.device))


def parts(
    memory: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    following: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The product as parts of its sum over k, in the first of `memory`: [parts, rows, features]. None: not for these
    arguments.
    """
    rows, features = x.shape[0], weight.shape[0]
    library = _library(memory, x, weight) if rows in PARTED_ROWS else None
    if library is None or not _fast_memory(x.device):
        return None
    count = num_parts(features, weight.shape[1], _multiprocessors(x.device))
    if not count or memory.numel() < count * rows * features:
        return None
    left = memory.flatten()[: count * rows * features].view(count, rows, features)
    args = _arguments(library, left[0], x, weight, bias, following)
    args.parts = count
    return left if library.call("mii_linear_wide", args, native.stream(x.device)) else None


def parts_size(device: torch.device) -> int:
    """Floats that the parts of a product take at most; 0: no product is left in parts on this device."""
    if device.type != "cuda" or native.library(device) is None or not _fast_memory(device):
        return 0
    return PARTED_ROWS[-1] * 128 * _multiprocessors(device)


def num_parts(features: int, in_features: int, multiprocessors: int) -> int:
    """In how many parts a product is left by so many multiprocessors; 0: it is better made whole."""
    tiles = -(-features // 128)
    count = min(multiprocessors // tiles, in_features // 64, MOST_PARTS)
    return count if count > 1 and count * tiles >= PARTED_SHARE * multiprocessors else 0


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _library(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> native.Library | None:
    """The library, if these tensors are something for it."""
    if not x.is_cuda or x.shape[0] == 0 or weight.dtype not in (torch.float16, torch.bfloat16):
        return None
    strided = x.stride(1) != 1 or out.stride(-1) != 1 or not weight.is_contiguous()
    return None if strided else native.library(x.device)


def _arguments(
    library: native.Library,
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    following: torch.Tensor | None,
) -> ctypes.Structure:
    """`MiiLinearStreamed` of the whole product, which is not gated unless the caller says so."""
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
    return abi.MiiLinearStreamed(product, *_ahead(following), FETCH_BYTES)


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
