"""Activations of the MLP, gated or plain.

    gated:  a row of x is [gate | up], each `width` wide:  out = act(gate) * up        (GLU variants, Shazeer 2020)
    plain:  out = act(x)

A bias, as wide as x, is added to x first. Computed in float and rounded once. The activations:

    silu        x * sigmoid(x)
    gelu        x/2 * (1 + erf(x / sqrt 2))
    gelu_tanh   x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    gelu_quick  x * sigmoid(1.702 x)
    relu        max(x, 0)
    relu2       max(x, 0)^2
    softcap     limit * tanh(x / limit)     (Gemma 2's logits)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from mii.ops import abi, native

_BODIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def activation(
    out: torch.Tensor,
    x: torch.Tensor,
    kind: str,
    *,
    gated: bool,
    bias: torch.Tensor | None = None,
    limit: float = 1.0,
) -> None:
    """Applies an activation to each row of x.

    Args:
        out: [rows, width]; x: [rows, 2 * width] when gated, else [rows, width]; rows may be strided, one dtype.
        kind: one of `abi.ACTIVATIONS`.
        gated: whether x holds gate and up side by side.
        bias: as wide as x, or None.
        limit: of a soft cap, above 0.

    Raises:
        ValueError: an unknown kind, shapes or dtypes that do not fit together, a limit that is not above 0.
    """
    code = abi.ACTIVATIONS.get(kind)
    if code is None:
        raise ValueError(f"activation: unknown kind {kind!r}; the known ones are {', '.join(abi.ACTIVATIONS)}")
    _check(out, x, gated, bias)
    if not limit > 0:
        raise ValueError(f"activation: a soft cap of {limit} is not above 0")
    library = native.library(x.device)
    dtype = abi.DTYPE_CODES.get(x.dtype)
    if library is not None and dtype is not None and library.has("mii_activation"):
        args = abi.MiiActivation(
            out.data_ptr(),
            x.data_ptr(),
            native.pointer(bias),
            out.shape[0],
            out.shape[1],
            x.stride(0),
            out.stride(0),
            limit,
            code,
            gated,
            dtype,
        )
        if library.call("mii_activation", args, native.stream(x.device)):
            return
    activation_reference(out, x, kind, gated=gated, bias=bias, limit=limit)


def _check(out: torch.Tensor, x: torch.Tensor, gated: bool, bias: torch.Tensor | None) -> None:
    rows, width = out.shape
    wide = 2 * width if gated else width
    if x.shape != (rows, wide) or x.dtype != out.dtype or x.stride()[1] != 1 or out.stride()[1] != 1:
        raise ValueError(
            f"activation: x {tuple(x.shape)} {x.dtype} must be [{rows}, {wide}] of out's dtype {out.dtype}, both "
            f"contiguous along a row, for a {'gated' if gated else 'plain'} activation into {tuple(out.shape)}"
        )
    if bias is not None and (bias.shape != (wide,) or bias.dtype != x.dtype):
        raise ValueError(f"activation: bias {tuple(bias.shape)} {bias.dtype} must be [{wide}] of dtype {x.dtype}")


def activation_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    kind: str,
    *,
    gated: bool,
    bias: torch.Tensor | None = None,
    limit: float = 1.0,
) -> None:
    """`activation` in plain torch."""
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        value = value + bias
    up: torch.Tensor | float = 1.0
    if gated:
        value, up = value.chunk(2, dim=1)
    active = limit * torch.tanh(value / limit) if kind == "softcap" else _BODIES[kind](value)
    out.copy_(active * up)
