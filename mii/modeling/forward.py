"""What a forward works on: the buffers of a step, and the step as the layers see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mii.modeling.experts import ExpertBuffers, ExpertMemory
from mii.modeling.parameters import Placement
from mii.modeling.spec import ModelSpec
from mii.ops.attention import AttentionBatch, AttentionPlan
from mii.ops.prepare import StepTensors


@dataclass(slots=True)
class Activations:
    """The buffers of one forward, [tokens, width] each, and for the sampled rows [samples, width].

    `experts` are those of a mixture of experts, where the model has one. `joint` is `attention` and `activated` side by
    side, where a block multiplies both at once; else it has no width.
    """

    hidden: torch.Tensor
    residual: torch.Tensor
    branch: torch.Tensor
    qkv: torch.Tensor
    attention: torch.Tensor
    up: torch.Tensor
    activated: torch.Tensor
    joint: torch.Tensor
    last: torch.Tensor
    last_residual: torch.Tensor
    last_normed: torch.Tensor
    last_projected: torch.Tensor
    logits: torch.Tensor
    experts: ExpertBuffers | None = None


class ActivationArena:
    """Memory for the largest step, handed out as views of fewer rows; views are kept, since shapes recur."""

    def __init__(self, spec: ModelSpec, place: Placement, max_tokens: int, max_samples: int, up_width: int) -> None:
        widths = {
            "hidden": spec.hidden_size,
            "residual": spec.hidden_size,
            "branch": spec.hidden_size,
            "qkv": spec.q_size + 2 * spec.kv_size,
            "up": up_width,
        }
        self._rows = {name: place.empty(max_tokens, width) for name, width in widths.items()}
        self._rows |= _joint(place, max_tokens, spec)
        sampled = dict.fromkeys(("last", "last_residual", "last_normed"), spec.hidden_size)
        sampled |= {"last_projected": spec.embedding_size, "logits": spec.vocab_span.size}
        self._samples = {name: place.empty(max_samples, width) for name, width in sampled.items()}
        self._experts = None if spec.experts is None else ExpertMemory(spec, place, max_tokens)
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
            sampled = {name: tensor[:samples] for name, tensor in self._samples.items()}
            experts = None if self._experts is None else self._experts.views(tokens)
            self._views[key] = Activations(**rows, **sampled, experts=experts)
        return self._views[key]

    @property
    def num_bytes(self) -> int:
        own = sum(t.numel() * t.element_size() for t in (*self._rows.values(), *self._samples.values()))
        return own + (0 if self._experts is None else self._experts.num_bytes)


def _joint(place: Placement, max_tokens: int, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """What attention and the MLP write before their last products: side by side in parallel blocks."""
    widths = {"attention": spec.q_size, "activated": spec.mlp_width}
    if not spec.parallel:
        return {name: place.empty(max_tokens, width) for name, width in (*widths.items(), ("joint", 0))}
    joint = place.empty(max_tokens, sum(widths.values()))
    return {"joint": joint, **dict(zip(widths, joint.split(list(widths.values()), dim=1), strict=True))}


@dataclass(slots=True)
class Forward:
    """One step as the layers see it: what `prepare` wrote, the cache, the attention plans by window, the buffers.

    `cos_sin` has the rotary table of every layer, None for no rotation; `rope_rows` are the rows that the tokens take.
    """

    step: StepTensors
    ids: torch.Tensor
    positions: torch.Tensor
    rope_rows: torch.Tensor
    kv_slots: torch.Tensor
    sample_rows: torch.Tensor
    cos_sin: list[torch.Tensor | None]
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    batch: AttentionBatch
    plans: dict[int, AttentionPlan]
    buffers: Activations
