"""The products of a mixture of experts: each expert's rows with its own weights, and the sum of a token's choices.

    hidden[row] = act(x[token] @ gate^T) * (x[token] @ up^T)        moe_up
    parts[pair] = weight[pair] * (hidden[row] @ down^T)             moe_down
                                                                    moe_mlp: both
    out[token]  = sum of its parts + sigmoid(shared_gate) * shared  moe_combine: in float, in the order of the choices

Rows, pairs and tiles are those of `mii.ops.moe_routing`, weights those of `mii.ops.moe_weights`. On the CPU
csrc/cpu/isa/moe.cpp multiplies. On a GPU `choose_kernel` picks by the number of tokens: a stream of the weights of the
experts that are hit, which does both products in one launch (csrc/include/mii/moe_stream.cuh; moe_few.cuh for tiles of
8 rows on compute capability 9.0), or tensor-core tiles (moe_mma.cuh; moe_wide.cuh on 9.0, for which moe_gather.cuh puts
an expert's rows side by side).
"""

from __future__ import annotations

import itertools

import torch

from mii.ops import abi, native
from mii.ops.activation import activation_reference
from mii.ops.moe_routing import ExpertRows, Routing
from mii.ops.moe_weights import ExpertWeights

# The best kernels that a GPU may take: "simple" (plain cores), "mma" (with the stream for few rows), "wgmma" (the same
# and compute capability 9.0's tensor cores for prompts). benchmarks/kernels_moe.py measures them.
KERNELS = "wgmma"
STREAMED_ROWS = 48  # of an expert on average, up to which the weights' bytes take longer than the arithmetic


def choose_kernel(
    routing: Routing, tokens: int, features: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """The kernel (a MOE_ code of `abi`) and the rows of a tile for products of so many tokens on this device.

    Args:
        features: The widths of the products' inputs and outputs: tensor cores take whole chunks of 16 bytes.
    """
    if (
        device.type != "cuda"
        or KERNELS == "simple"
        or dtype not in (torch.float16, torch.bfloat16)
        or any(n % 8 for n in features)
    ):
        return abi.MOE_SIMPLE, 8
    if tokens * routing.top_k <= STREAMED_ROWS * routing.experts or tokens <= 64:
        return abi.MOE_STREAM, stream_rows(routing, tokens)
    if KERNELS == "wgmma" and torch.cuda.get_device_capability(device) == (9, 0):
        return abi.MOE_WGMMA, 192
    return abi.MOE_MMA, 128


def stream_rows(routing: Routing, tokens: int) -> int:
    """The rows of the stream's tiles: the fewer, the faster, but what an expert has beyond a tile reads its weights
    again. By the mean over the experts, which leaves room for those that more tokens choose.

    >>> [stream_rows(Routing(128, 8), tokens) for tokens in (1, 32, 64, 128, 256)]
    [8, 8, 16, 16, 64]
    """
    mean = tokens * routing.top_k / routing.experts
    if tokens <= 8 or mean <= 3:
        return 8
    return 16 if tokens <= 16 or mean <= 8 else 64


def moe_mlp(
    out: torch.Tensor,
    hidden: torch.Tensor,
    x: torch.Tensor,
    up: ExpertWeights,
    down: ExpertWeights,
    rows: ExpertRows,
    routing: Routing,
    kind: str,
) -> None:
    """`moe_up` of x into hidden and `moe_down` of that into out, in one launch where the step's kernel is the stream.
    What out holds before may be lost as soon as this begins: rows of x as wide as it are gathered there.

    Raises:
        ValueError: Shapes or dtypes that do not fit together.
    """
    pairs = rows.tokens * routing.top_k
    if rows.kernel != abi.MOE_STREAM:
        moe_up(hidden, x, up, rows, routing, kind, scratch=out if down.out_features == up.in_features else None)
        moe_down(out, hidden, down, rows, routing)
        return
    _check("moe_up", hidden, (pairs, up.out_features), x, (rows.tokens, up.in_features), up, gated=True)
    _check("moe_down", out, (pairs, down.out_features), hidden, (pairs, down.in_features), down, gated=False)
    library = native.library(x.device)
    if library is not None and library.has("mii_moe_stream") and up.dtype in abi.DTYPE_CODES:
        args = abi.MiiMoeStream(
            out.data_ptr(),
            hidden.data_ptr(),
            x.data_ptr(),
            up.data.data_ptr(),
            down.data.data_ptr(),
            rows.weights.data_ptr(),
            rows.pairs.data_ptr(),
            rows.tiles.data_ptr(),
            _workspace(library, x.device).data_ptr(),
            rows.tokens,
            up.in_features,
            up.out_features,
            x.stride(0),
            hidden.stride(0),
            out.stride(0),
            up.experts,
            routing.top_k,
            rows.tile_rows,
            abi.ACTIVATIONS[kind],
            abi.DTYPE_CODES[up.dtype],
        )
        if library.call("mii_moe_stream", args, native.stream(x.device)):
            return
    moe_up_reference(hidden, x, up, rows, routing, kind)
    moe_down_reference(out, hidden, down, rows)


def moe_up(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: ExpertWeights,
    rows: ExpertRows,
    routing: Routing,
    kind: str,
    *,
    scratch: torch.Tensor | None = None,
) -> None:
    """out[row] = act(x[token] @ gate^T) * (x[token] @ up^T), summed in float and rounded once.

    Args:
        out: [tokens * top_k, out_features] by row; rows may be strided. Rows past the last one stay untouched.
        x: [tokens, in_features], rows may be strided; the weight's dtype.
        weight: Gated, from `pack_experts`.
        rows: From `route`. The stream's kernel does both products at once: see `moe_mlp`.
        kind: The activation, one of `abi.ACTIVATIONS`.
        scratch: [tokens * top_k, in_features] of x's dtype, rows may be strided: where the fastest kernel for prompts
            has each expert's rows of x one after the other. None: another kernel serves.

    Raises:
        ValueError: Shapes or dtypes that do not fit together.
    """
    pairs = rows.tokens * routing.top_k
    _check("moe_up", out, (pairs, weight.out_features), x, (rows.tokens, weight.in_features), weight, gated=True)
    if scratch is not None and (scratch.shape != (pairs, weight.in_features) or scratch.dtype != x.dtype):
        raise ValueError(
            f"moe_up: scratch {tuple(scratch.shape)} {scratch.dtype} must be {[pairs, weight.in_features]} of {x.dtype}"
        )
    if not _native("mii_moe_up", out, x, weight, rows, routing, abi.ACTIVATIONS[kind], scratch):
        moe_up_reference(out, x, weight, rows, routing, kind)


def moe_down(out: torch.Tensor, x: torch.Tensor, weight: ExpertWeights, rows: ExpertRows, routing: Routing) -> None:
    """out[pair] = weight[pair] * (x[row] @ down^T), summed in float and rounded once.

    Args:
        out: [tokens * top_k, out_features] by pair; rows may be strided. Pairs of padding stay untouched.
        x: [tokens * top_k, in_features] by row, rows may be strided; the weight's dtype.
        weight: Not gated, from `pack_experts`.
        rows: From `route`.

    Raises:
        ValueError: Shapes or dtypes that do not fit together.
    """
    pairs = rows.tokens * routing.top_k
    _check("moe_down", out, (pairs, weight.out_features), x, (pairs, weight.in_features), weight, gated=False)
    if not _native("mii_moe_down", out, x, weight, rows, routing, 0):
        moe_down_reference(out, x, weight, rows)


def _check(
    name: str,
    out: torch.Tensor,
    out_shape: tuple[int, int],
    x: torch.Tensor,
    x_shape: tuple[int, int],
    weight: ExpertWeights,
    *,
    gated: bool,
) -> None:
    fits = out.shape == out_shape and x.shape == x_shape and x.dtype == out.dtype == weight.dtype
    if not fits or weight.gated != gated or x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(
            f"{name}: x {tuple(x.shape)} {x.dtype} and out {tuple(out.shape)} {out.dtype} must be {list(x_shape)} and "
            f"{list(out_shape)} of the weight's dtype {weight.dtype}, contiguous along a row, and the weight "
            f"{'gated' if gated else 'not gated'}"
        )


def _native(
    name: str,
    out: torch.Tensor,
    x: torch.Tensor,
    weight: ExpertWeights,
    rows: ExpertRows,
    routing: Routing,
    kind: int,
    scratch: torch.Tensor | None = None,
) -> bool:
    library = native.library(x.device)
    if (
        library is None
        or not library.has(name)
        or weight.dtype not in abi.DTYPE_CODES
        or weight.packed != (x.device.type == "cpu")
    ):
        return False
    args = abi.MiiMoeLinear(
        out.data_ptr(),
        x.data_ptr(),
        weight.data.data_ptr(),
        rows.weights.data_ptr(),
        rows.offsets.data_ptr(),
        rows.pairs.data_ptr(),
        rows.places.data_ptr(),
        rows.tiles.data_ptr(),
        rows.tokens,
        weight.in_features,
        weight.out_features,
        x.stride(0),
        out.stride(0),
        weight.experts,
        routing.top_k,
        rows.tile_rows,
        kind,
        rows.kernel,
        abi.DTYPE_CODES[weight.dtype],
        native.pointer(scratch),
        0 if scratch is None else scratch.stride(0),
    )
    return library.call(name, args, native.stream(x.device))


_workspaces: dict[torch.device, torch.Tensor] = {}


def _workspace(library: native.Library, device: torch.device) -> torch.Tensor:
    """Partial sums and their counters, one for each device: the calls of an engine follow one another in a stream."""
    if device not in _workspaces:
        size = library.bytes("mii_moe_workspace_bytes", abi.MiiMoeStream())
        _workspaces[device] = torch.zeros(size, dtype=torch.uint8, device=device)
    return _workspaces[device]


def moe_combine(
    out: torch.Tensor,
    parts: torch.Tensor,
    *,
    top_k: int,
    shared: torch.Tensor | None = None,
    shared_gate: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """out[token] = sum of parts[token * top_k ..] + sigmoid(shared_gate[token]) * shared[token]; padding becomes zeros.

    Args:
        out: [tokens, width], rows may be strided.
        parts: [tokens * top_k, width], contiguous.
        shared: [tokens, width] or None, rows may be strided.
        shared_gate: [tokens, 1] logits, contiguous, or None: the shared rows count in full.
        counts: The step's counts, as for `route`.

    Raises:
        ValueError: Shapes that do not fit together.
    """
    tokens, width = out.shape
    fits = parts.shape == (tokens * top_k, width) and parts.is_contiguous() and parts.dtype == out.dtype
    if shared is not None:
        fits = fits and shared.shape == out.shape and shared.stride(1) == 1
    if not fits or out.stride(1) != 1:
        raise ValueError(
            f"moe_combine: parts {tuple(parts.shape)} must be {[tokens * top_k, width]} and contiguous, and shared as "
            f"out, {tuple(out.shape)}, of one dtype"
        )
    library = native.library(out.device)
    if library is not None and library.has("mii_moe_combine") and out.dtype in abi.DTYPE_CODES:
        args = abi.MiiMoeCombine(
            out.data_ptr(),
            parts.data_ptr(),
            native.pointer(shared),
            native.pointer(shared_gate),
            native.pointer(counts),
            tokens,
            width,
            out.stride(0),
            0 if shared is None else shared.stride(0),
            top_k,
            abi.DTYPE_CODES[out.dtype],
        )
        if library.call("mii_moe_combine", args, native.stream(out.device)):
            return
    moe_combine_reference(out, parts, top_k=top_k, shared=shared, shared_gate=shared_gate, counts=counts)


def moe_up_reference(
    out: torch.Tensor, x: torch.Tensor, weight: ExpertWeights, rows: ExpertRows, routing: Routing, kind: str
) -> None:
    """`moe_up` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    offsets = rows.offsets.tolist()
    for expert, (first, last) in enumerate(itertools.pairwise(offsets)):
        if first < last:
            tokens = rows.pairs[first:last].long() // routing.top_k
            both = x[tokens].to(wide) @ weight.expert(expert).to(wide).t()
            activation_reference(out[first:last], both, kind, gated=True)


def moe_down_reference(out: torch.Tensor, x: torch.Tensor, weight: ExpertWeights, rows: ExpertRows) -> None:
    """`moe_down` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    offsets = rows.offsets.tolist()
    for expert, (first, last) in enumerate(itertools.pairwise(offsets)):
        if first < last:
            pairs = rows.pairs[first:last].long()
            value = x[first:last].to(wide) @ weight.expert(expert).to(wide).t()
            out[pairs] = (value * rows.weights[pairs, None]).to(out.dtype)


def moe_combine_reference(
    out: torch.Tensor,
    parts: torch.Tensor,
    *,
    top_k: int,
    shared: torch.Tensor | None = None,
    shared_gate: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """`moe_combine` in plain torch."""
    wide = torch.promote_types(out.dtype, torch.float32)
    tokens, width = out.shape
    total = parts.view(tokens, top_k, width).to(wide).sum(dim=1)
    if shared is not None:
        gate = 1.0 if shared_gate is None else shared_gate.view(tokens, 1).to(wide).sigmoid()
        total = total + gate * shared.to(wide)
    if counts is not None:
        padding = torch.arange(tokens, device=out.device) >= counts[abi.NUM_TOKENS]
        total = total.masked_fill(padding[:, None], 0)
    out.copy_(total)
