"""Self-attention over the paged cache, from the normed stream to what a block adds to it."""

from __future__ import annotations

import torch

from mii.modeling.forward import Forward
from mii.modeling.parameters import Linear, Module, Placement
from mii.modeling.spec import ModelSpec
from mii.ops.attention import attention
from mii.ops.rope_kv import rope_kv


class Attention(Module):
    """Fused query, key and value projection, rotary positions, KV write, paged attention, output projection."""

    def __init__(self, place: Placement, spec: ModelSpec, layer: int) -> None:
        parts = {"q": spec.q_size, "k": spec.kv_size, "v": spec.kv_size}
        self.qkv = Linear(place, spec.hidden_size, parts, bias=spec.qkv_bias)
        self.output = Linear(place, spec.q_size, {"": spec.hidden_size}, bias=spec.output_bias)
        self.spec, self.layer, self.window = spec, layer, spec.windows[layer]
        self._rotary_dim = spec.rope.rotary_dim if spec.rope else 0
        self._interleaved = bool(spec.rope and spec.rope.interleaved)

    def __call__(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        spec, buffers = self.spec, forward.buffers
        k_cache, v_cache = forward.caches[self.layer]
        qkv = self.qkv(buffers.qkv, x)
        rope_kv(
            qkv,
            k_cache,
            v_cache,
            forward.cos_sin,
            forward.rope_rows,
            forward.kv_slots,
            q_heads=spec.q_heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            rotary_dim=self._rotary_dim,
            interleaved=self._interleaved,
        )
        plan = forward.plans[self.window]
        queries = qkv[:, : spec.q_size]
        attention(buffers.attention, queries, k_cache, v_cache, forward.batch, plan, scale=spec.attention_scale)
        return self.output(out, buffers.attention)
