"""Self-attention over the paged cache, from the normed stream to what a block adds to it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from mii.modeling.forward import Forward
from mii.modeling.latent import LatentInputs, PaddedOutput
from mii.modeling.layers import Norm, RowNorm
from mii.modeling.parameters import Linear, Module, Placement
from mii.modeling.spec import ModelSpec
from mii.ops import native
from mii.ops.all_reduce import Group
from mii.ops.attention import attention
from mii.ops.decode_attention import decode_attention
from mii.ops.rope_kv import rope_kv
from mii.ops.summands import Summands


class Attention(Module):
    """Fused query, key and value projection (or what makes them of latents), norms of queries and keys, rotary
    positions, KV write, paged attention, output projection.

    Without the output projection (`project=False`) the layer ends in `attend`, and its block goes on from there.
    """

    def __init__(self, place: Placement, spec: ModelSpec, layer: int, *, project: bool = True) -> None:
        self.qkv = _inputs(place, spec)
        self.output = _output(place, spec) if project else None
        self.spec, self.layer, self.window = spec, layer, spec.windows[layer]
        self.q_norm: Norm | RowNorm | None = None
        self.k_norm: Norm | RowNorm | None = None
        if spec.row_norm:
            self.q_norm = RowNorm(place, spec, spec.q_span, counts=True)
            self.k_norm = RowNorm(place, spec, spec.kv_span, counts=spec.shard is None or spec.shard.first_of_keys)
        elif spec.head_norm:
            self.q_norm, self.k_norm = Norm(place, spec, spec.head_dim), Norm(place, spec, spec.head_dim)
        # The rotation's kernel norms heads by their root mean square; whole rows, and heads by LayerNorm, come before.
        self._norms_apart = spec.row_norm or (spec.head_norm and spec.norm == "layer")
        rope = spec.ropes[layer]
        self._rotary_dim = rope.rotary_dim if rope else 0
        self._interleaved = bool(rope and rope.interleaved)
        self._scale = spec.attention_scale * (spec.layer_scales[layer] if spec.layer_scales else 1.0)
        slopes = spec.alibi_slopes
        self._growth = _query_growth(spec, place) if 0 < spec.log_length < spec.max_positions else None
        self._decodes_at_once = self._rotates_plainly()
        self._slopes = torch.tensor(slopes, dtype=torch.float32, device=place.device) if slopes else None

    def __call__(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Writes the attention of `x` [tokens, hidden] into `out` and returns it."""
        return self.project_out(out, self.attend(forward, x))

    def project_out(self, out: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Writes what becomes of the heads' results, [tokens, heads * head size], into `out` and returns it."""
        assert self.output is not None
        return self.output(out, heads)

    def to_norm(self, forward: Forward, out: torch.Tensor, heads: torch.Tensor) -> torch.Tensor | Summands:
        """The same for a norm that adds it to a residual: as `Linear.to_norm`."""
        assert self.output is not None
        return self.output.to_norm(out, heads, forward.buffers.summands)

    @property
    def is_linear(self) -> bool:
        """Whether queries, keys and values are one product of the stream, of which a part can come first."""
        return isinstance(self.qkv, Linear)

    def project(self, forward: Forward, rows: slice, x: torch.Tensor) -> None:
        """Queries, keys and values of a part of the tokens, x [their number, hidden], for `attend_projected`."""
        assert isinstance(self.qkv, Linear)
        self.qkv(forward.buffers.qkv[rows], x)

    def leave_sum(self) -> Group | None:
        """As `Linear.leave_sum`."""
        assert self.output is not None
        return self.output.leave_sum()

    def attend(self, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """The heads' results for `x`, in the step's buffer for them, [tokens, heads * head size]."""
        buffers = forward.buffers
        if isinstance(self.qkv, LatentInputs):
            self.qkv(buffers.qkv, buffers.latent, x)
        else:
            self.qkv(buffers.qkv, x)
        return self.attend_projected(forward)

    def attend_projected(self, forward: Forward) -> torch.Tensor:
        """As `attend`, once queries, keys and values are in their buffer."""
        spec, buffers = self.spec, forward.buffers
        k_cache, v_cache = forward.caches[self.layer]
        qkv, plan = buffers.qkv, forward.plans[self.window]
        how: dict[str, Any] = {"scale": self._scale, "softcap": spec.attention_softcap, "alibi_slopes": self._slopes}
        if self._norms_apart:
            self._norm_slices(qkv)
        if forward.decodes and self._decodes_at_once:
            new = (forward.cos_sin[self.layer], forward.rope_rows, forward.kv_slots)
            decode_attention(buffers.attention, qkv, k_cache, v_cache, *new, forward.batch, plan, **how)
            return buffers.attention
        rope_kv(
            qkv,
            k_cache,
            v_cache,
            forward.cos_sin[self.layer],
            forward.rope_rows,
            forward.kv_slots,
            q_heads=spec.q_heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            rotary_dim=self._rotary_dim,
            interleaved=self._interleaved,
            **self._head_norms(),
        )
        queries = qkv[:, : spec.q_size]
        if self._growth is not None:
            native.aside(partial(_grow, queries, self._growth, forward.positions))
        attention(buffers.attention, queries, k_cache, v_cache, forward.batch, plan, **how)
        return buffers.attention

    def _rotates_plainly(self) -> bool:
        """Whether decode attention can take queries, keys and values as they are in their buffer: see its module."""
        whole = self._rotary_dim in (0, self.spec.head_dim) and not self._interleaved
        return whole and self._growth is None and (self.q_norm is None or self._norms_apart)

    def _norm_slices(self, qkv: torch.Tensor) -> None:
        """Norms all queries and all keys of each row, or head by head."""
        spec, keys_end = self.spec, self.spec.q_size + self.spec.kv_size
        for norm, start, end in ((self.q_norm, 0, spec.q_size), (self.k_norm, spec.q_size, keys_end)):
            width = end - start if spec.row_norm else spec.head_dim
            for first in range(start, end, width):
                part = qkv[:, first : first + width]
                if isinstance(norm, RowNorm):
                    norm(part)
                elif norm is not None:
                    norm(part, part)

    def _head_norms(self) -> dict[str, Any]:
        """What the rotation does with each head before it turns it."""
        q, k = self.q_norm, self.k_norm
        if self._norms_apart or q is None or k is None or q.weight is None or k.weight is None:
            return {}
        return {"q_norm": q.weight.tensor, "k_norm": k.weight.tensor, "norm_eps": q.eps, "norm_kind": q.kind}


def _inputs(place: Placement, spec: ModelSpec) -> Linear | LatentInputs:
    """What gives [all queries | all keys | all values]."""
    if spec.latent is not None:
        return LatentInputs(place, spec, spec.latent)
    parts = {"q": spec.q_span, "k": spec.kv_span, "v": spec.kv_span}
    return Linear(place, spec.hidden_size, parts, bias=spec.qkv_bias)


def _output(place: Placement, spec: ModelSpec) -> Linear:
    if spec.latent is not None:
        return PaddedOutput(place, spec, spec.latent)
    return Linear(place, spec.q_span, {"": spec.hidden_size}, bias=spec.output_bias)


def _query_growth(spec: ModelSpec, place: Placement) -> torch.Tensor:
    """The factor on the queries of each position, [max_positions, 1]: 1 up to the length that is the base."""
    lengths = torch.arange(1, spec.max_positions + 1, dtype=torch.float64).clamp(min=spec.log_length)
    return (lengths.log() / math.log(spec.log_length)).to(place.device, place.dtype)[:, None]


def _grow(queries: torch.Tensor, growth: torch.Tensor, positions: torch.Tensor) -> None:
    queries.mul_(growth.index_select(0, positions))
