"""The layers that families are wired from. Each writes into buffers of the step's arena; none allocates.

A layer's call takes the step's `Forward` and the buffers it reads and writes, so its signature stays that of the
mathematics; what is ragged about the batch stays in `Forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mii.modeling.parameters import Linear, Module, Parameter, Placement
from mii.modeling.spec import ModelSpec
from mii.ops import abi
from mii.ops.activation import activation
from mii.ops.attention import AttentionBatch, AttentionPlan, attention
from mii.ops.embedding import embedding
from mii.ops.norm import norm
from mii.ops.prepare import StepTensors
from mii.ops.rope_kv import rope_kv


@dataclass(slots=True)
class Activations:
    """The buffers of one forward, [tokens, width] each, and for the sampled rows [samples, width]."""

    hidden: torch.Tensor
    residual: torch.Tensor
    branch: torch.Tensor
    qkv: torch.Tensor
    attention: torch.Tensor
    up: torch.Tensor
    activated: torch.Tensor
    last: torch.Tensor
    last_residual: torch.Tensor
    last_normed: torch.Tensor
    logits: torch.Tensor


class ActivationArena:
    """Memory for the largest step, handed out as views of fewer rows; views are kept, since shapes recur."""

    def __init__(self, spec: ModelSpec, place: Placement, max_tokens: int, max_samples: int, up_width: int) -> None:
        widths = {
            "hidden": spec.hidden_size,
            "residual": spec.hidden_size,
            "branch": spec.hidden_size,
            "qkv": spec.q_size + 2 * spec.kv_size,
            "attention": spec.q_size,
            "up": up_width,
            "activated": spec.intermediate_size,
        }
        self._rows = {name: place.empty(max_tokens, width) for name, width in widths.items()}
        sampled = dict.fromkeys(("last", "last_residual", "last_normed"), spec.hidden_size) | {
            "logits": spec.vocab_size
        }
        self._samples = {name: place.empty(max_samples, width) for name, width in sampled.items()}
        self.max_samples = max_samples
        self._views: dict[tuple[int, int], Activations] = {}
        # Padding of a bucket reads what no step wrote: zeros, so that it stays finite.
        for tensor in self._rows.values():
            tensor.zero_()

    def views(self, tokens: int, samples: int) -> Activations:
        key = (tokens, samples)
        if key not in self._views:
            if len(self._views) >= 1024:
                self._views.clear()
            rows = {name: tensor[:tokens] for name, tensor in self._rows.items()}
            self._views[key] = Activations(**rows, **{name: tensor[:samples] for name, tensor in self._samples.items()})
        return self._views[key]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self._rows.values(), *self._samples.values()))


@dataclass(slots=True)
class Forward:
    """One step as the layers see it: what `prepare` wrote, the cache, the attention plans by window, the buffers.

    `rope_rows` are the rows of `cos_sin` to rotate each token by: its position, but for tables made for one step.
    """

    step: StepTensors
    ids: torch.Tensor
    positions: torch.Tensor
    rope_rows: torch.Tensor
    kv_slots: torch.Tensor
    sample_rows: torch.Tensor
    cos_sin: torch.Tensor | None
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    batch: AttentionBatch
    plans: dict[int, AttentionPlan]
    buffers: Activations


class Embedding(Module):
    """Token embeddings, [vocab, hidden]."""

    def __init__(self, place: Placement, vocab: int, width: int) -> None:
        self.weight = Parameter(place.empty(vocab, width))

    def __call__(self, out: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        embedding(out, self.weight.tensor, ids)
        return out


class Norm(Module):
    """RMSNorm or LayerNorm, with the residual addition before it when one is given."""

    def __init__(self, place: Placement, width: int, eps: float, *, kind: int = abi.RMS, bias: bool = False) -> None:
        self.weight = Parameter(place.empty(width))
        self.bias = Parameter(place.empty(width)) if bias else None
        self.eps, self.kind = eps, kind

    def __call__(self, out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.tensor
        norm(out, x, self.weight.tensor, eps=self.eps, bias=bias, residual=residual, kind=self.kind)
        return out


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


class GatedMLP(Module):
    """`down(act(gate(x)) * up(x))`, with gate and up as one product."""

    def __init__(self, place: Placement, spec: ModelSpec) -> None:
        size = spec.intermediate_size
        self.up = Linear(place, spec.hidden_size, {"gate": size, "up": size}, bias=spec.mlp_bias)
        self.down = Linear(place, size, {"": spec.hidden_size}, bias=spec.mlp_bias)
        self.kind = spec.activation

    def __call__(self, forward: Forward, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        buffers = forward.buffers
        activation(buffers.activated, self.up(buffers.up, x), self.kind, gated=True)
        return self.down(out, buffers.activated)


class PreNormBlock(Module):
    """A decoder layer of the Llama family.

    Residual additions are part of the norms: on entry `branch` holds what the layer before added (or None at the first
    layer) and is added to `residual` by this layer's first norm; on return `branch` holds this layer's MLP output.
    """

    def __init__(self, place: Placement, spec: ModelSpec, layer: int) -> None:
        self.attention_norm = Norm(place, spec.hidden_size, spec.norm_eps)
        self.attention = Attention(place, spec, layer)
        self.mlp_norm = Norm(place, spec.hidden_size, spec.norm_eps)
        self.mlp = GatedMLP(place, spec)

    def __call__(self, forward: Forward, first: bool) -> None:
        buffers = forward.buffers
        hidden, residual, branch = buffers.hidden, buffers.residual, buffers.branch
        if first:
            self.attention_norm(hidden, residual)
        else:
            self.attention_norm(hidden, branch, residual)
        self.attention(forward, branch, hidden)
        self.mlp_norm(hidden, branch, residual)
        self.mlp(forward, branch, hidden)
