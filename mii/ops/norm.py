"""RMSNorm and LayerNorm, with the residual addition in front of them.

With a residual: residual += x, rounded to the dtype and written back, and v = residual; else v = x. In float:

    abi.RMS        out = round(v * rsqrt(mean(v^2) + eps)) * weight      (Llama: rounds before the weight)
    abi.RMS_PLUS1  out = v * rsqrt(mean(v^2) + eps) * (1 + weight)       (Gemma)
    abi.LAYER      out = (v - mean) * rsqrt(var + eps) * weight + bias   (biased variance)

each rounded to the dtype at the end. With an x_weight x is normed by itself first, residual += norm(x; x_weight), for
layers whose output is normed before it is added (OLMo-2, Gemma 2). An x that was left in parts is added up first and
rounded. Zhang and Sennrich, 2019 (RMSNorm); Ba, Kiros and Hinton, 2016 (LayerNorm).
"""

from __future__ import annotations

import ctypes

import torch

from mii.ops import abi, native
from mii.ops.summands import Summands


def norm(
    out: torch.Tensor | None,
    x: torch.Tensor | Summands,
    weight: torch.Tensor | None,
    *,
    eps: float,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    kind: int = abi.RMS,
    x_weight: torch.Tensor | None = None,
) -> None:
    """Norms each row of x, or of residual + x, into out.

    Args:
        out, x: [rows, width], rows may be strided; out may be x itself. With an x_weight out may be None: then only the
            residual is written. x may be in parts (`mii.ops.summands`).
        weight: [width] or None (ones).
        eps: added to the mean square or variance.
        bias: [width], with abi.LAYER only.
        residual: [rows, width], contiguous; x is added to it in place first.
        kind: abi.RMS, abi.RMS_PLUS1 or abi.LAYER.
        x_weight: [width], weight of the norm that x gets before it is added; needs a residual and an RMS kind.

    Raises:
        ValueError: shapes or dtypes that do not fit together, a bias without abi.LAYER, an x_weight without what it
            needs.
    """
    device = x.parts.device if isinstance(x, Summands) else x.device
    library = native.library(device)
    args = norm_arguments(out, x, weight, eps=eps, bias=bias, residual=residual, kind=kind, x_weight=x_weight)
    if (
        library is not None
        and args is not None
        and library.has("mii_norm")
        and library.call("mii_norm", args, native.stream(device))
    ):
        return
    norm_reference(out, x, weight, eps=eps, bias=bias, residual=residual, kind=kind, x_weight=x_weight)


def adds_parts(device: torch.device) -> bool:
    """Whether a kernel of this device takes an x in parts; elsewhere torch adds them up, which is slow."""
    return device.type == "cuda" and native.library(device) is not None


def norm_arguments(
    out: torch.Tensor | None,
    x: torch.Tensor | Summands,
    weight: torch.Tensor | None,
    *,
    eps: float,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    kind: int = abi.RMS,
    x_weight: torch.Tensor | None = None,
) -> ctypes.Structure | None:
    """The arguments of `norm`, checked, as a struct; None: a dtype that kernels do not have."""
    parts = None
    if isinstance(x, Summands):
        if residual is None or out is None:
            raise ValueError("norm: an x in parts needs a residual and an out")
        parts = _parts(x, residual)
        x = residual  # of which only shape and dtype count from here on
    _check(x if out is None else out, x, weight, bias, residual, kind)
    _check_x_weight(out, x, residual, kind, x_weight)
    if x.dtype not in abi.DTYPE_CODES:
        return None
    return abi.MiiNorm(
        native.pointer(out),
        x.data_ptr(),
        native.pointer(residual),
        native.pointer(weight),
        native.pointer(bias),
        native.pointer(x_weight),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        0 if out is None else out.stride(0),
        eps,
        kind,
        abi.DTYPE_CODES[x.dtype],
        native.pointer(parts),
        *((0, 0, 0, abi.DTYPE_CODES[x.dtype]) if parts is None else _layout(parts)),
    )


def _layout(parts: torch.Tensor) -> tuple[int, int, int, int]:
    """Number, strides and dtype of parts, as `MiiNorm` has them."""
    return parts.shape[0], parts.stride(0), parts.stride(1), abi.DTYPE_CODES[parts.dtype]


def _parts(x: Summands, residual: torch.Tensor) -> torch.Tensor:
    parts = x.parts
    known = x.dtype == residual.dtype and parts.dtype in (torch.float32, residual.dtype)
    if parts.shape[1:] != residual.shape or not known or parts.stride(2) != 1 or not len(parts):
        raise ValueError(
            f"norm: parts {tuple(parts.shape)} {parts.dtype} of {x.dtype} must be [parts, rows, width] of the "
            f"residual, {tuple(residual.shape)} {residual.dtype}, in float32 or that dtype and contiguous along a row"
        )
    return parts


def _check(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    kind: int,
) -> None:
    shape, dtype = x.shape, x.dtype
    if out.shape != shape or out.dtype != dtype or x.dim() != 2 or x.stride()[1] != 1 or out.stride()[1] != 1:
        raise ValueError(
            f"norm: out {tuple(out.shape)} {out.dtype} and x {tuple(x.shape)} {x.dtype} must be [rows, width] of one "
            "shape and dtype, contiguous along a row"
        )
    if weight is not None and (weight.shape != (shape[1],) or weight.dtype != dtype):
        raise ValueError(f"norm: weight {tuple(weight.shape)} {weight.dtype} must be [{shape[1]}] of dtype {dtype}")
    if bias is not None:
        if bias.shape != (shape[1],) or bias.dtype != dtype:
            raise ValueError(f"norm: bias {tuple(bias.shape)} {bias.dtype} must be [{shape[1]}] of dtype {dtype}")
        if kind != abi.LAYER:
            raise ValueError("norm: only a LayerNorm (kind abi.LAYER) has a bias")
    if residual is not None and (residual.shape != shape or residual.dtype != dtype or not residual.is_contiguous()):
        raise ValueError(
            f"norm: residual {tuple(residual.shape)} {residual.dtype} must be contiguous and like x, "
            f"{tuple(x.shape)} {x.dtype}"
        )


def _check_x_weight(
    out: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    kind: int,
    x_weight: torch.Tensor | None,
) -> None:
    if x_weight is None:
        if out is None:
            raise ValueError("norm: without an x_weight it needs an out")
    elif residual is None or kind == abi.LAYER:
        raise ValueError("norm: an x_weight needs a residual and one of the kinds abi.RMS and abi.RMS_PLUS1")
    elif x_weight.shape != (x.shape[1],) or x_weight.dtype != x.dtype:
        raise ValueError(
            f"norm: x_weight {tuple(x_weight.shape)} {x_weight.dtype} must be [{x.shape[1]}] of dtype {x.dtype}"
        )


def norm_reference(
    out: torch.Tensor | None,
    x: torch.Tensor | Summands,
    weight: torch.Tensor | None,
    *,
    eps: float,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    kind: int = abi.RMS,
    x_weight: torch.Tensor | None = None,
) -> None:
    """`norm` in plain torch."""
    x = x.total() if isinstance(x, Summands) else x
    wide = torch.promote_types(x.dtype, torch.float32)
    if x_weight is not None:
        branch = torch.empty_like(x)
        norm_reference(branch, x, x_weight, eps=eps, kind=kind)
        x = branch
    if residual is not None:
        residual.copy_(residual.to(wide) + x.to(wide))
        x = residual
    if out is None:
        return
    value = x.to(wide)
    if kind == abi.LAYER:
        value = value - value.mean(1, keepdim=True)
    value = value * torch.rsqrt(value.square().mean(1, keepdim=True) + eps)
    if kind == abi.RMS:
        value = value.to(x.dtype).to(wide)
    if weight is not None:
        value = value * (weight.to(wide) + 1.0 if kind == abi.RMS_PLUS1 else weight.to(wide))
    if bias is not None:
        value = value + bias.to(wide)
    out.copy_(value)
