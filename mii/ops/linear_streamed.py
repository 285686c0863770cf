"""Products of a few rows on a Hopper GPU by a kernel that streams the weight (csrc/include/mii/linear_stream.cuh).

It reads the weight where it lies, row-major, so cuBLASLt serves more rows from the same memory. The gated form computes
gate and up of an output side by side and applies the activation before anything is written.
"""

from __future__ import annotations

import torch

from mii.ops import abi, native

ROWS = 8  # up to which a product goes to this kernel, which takes no more; 0: cuBLASLt for all
# Bytes of the following product's weight that come into the L2 cache while a product ends: about what memory delivers
# between the last read of one product and the first of the next.
FETCH_BYTES = 8 << 20

_workspaces: dict[torch.device, torch.Tensor] = {}


def prepare(device: torch.device) -> None:
    """Makes the memory that the kernel needs on a device, so that no captured step has to."""
    library = native.library(device)
    if ROWS > 0 and device.type == "cuda" and library is not None:
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
    if not 0 < x.shape[0] <= ROWS or not x.is_cuda or activation not in (None, *abi.ACTIVATIONS):
        return False
    library = native.library(x.device)
    strided = x.stride(1) != 1 or out.stride(1) != 1 or not weight.is_contiguous()
    if library is None or strided or weight.dtype not in (torch.float16, torch.bfloat16):
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
        native.pointer(following),
        0 if following is None else following.numel() * following.element_size(),
        FETCH_BYTES,
        activation is not None,
        abi.ACTIVATIONS.get(activation or "", 0),
    )
    return library.call("mii_linear_streamed", args, native.stream(x.device))


def _workspace(library: native.Library, device: torch.device) -> torch.Tensor:
    """Partial sums and their counters, one for each device: the calls of an engine follow one another in a stream."""
    if device not in _workspaces:
        size = library.bytes("mii_linear_workspace_bytes", abi.MiiLinear())
        _workspaces[device] = torch.zeros(size, dtype=torch.uint8, device=device)
    return _workspaces[device]
