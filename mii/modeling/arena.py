"""The memory of a step's activations.

Buffers that are never needed at the same time lie in the same place (`mii.modeling.liveness`): what is widest, the gate
and up projections, takes up what queries, keys, values and logits had or will have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from mii.modeling.blocks import BLOCKS
from mii.modeling.experts import ExpertMemory
from mii.modeling.forward import Activations
from mii.modeling.liveness import ALWAYS, Claim, Life, lay_out, life
from mii.modeling.parameters import Placement
from mii.modeling.spec import ModelSpec
from mii.ops import linear_hopper
from mii.ops.linear import rows_at_once

_ALIGNED = 256  # bytes that every buffer begins at a multiple of

_LIVES = {
    "residual": ALWAYS,
    "branch": life(("output", "mlp_norm"), ("down", "end"), ("norm", "norm")),
    "latent": life(("qkv", "qkv")),
    "qkv": life(("qkv", "attend")),
    "attention": life(("attend", "output")),
    "up": life(("up", "activate")),
    "activated": life(("up", "down")),  # some kernels compute it from `hidden` at once
    "joint": life(("attend", "down")),
    "experts.logits": life(("up", "experts_up")),
    "experts.hidden": life(("experts_up", "experts_down")),
    # Gathered rows first; the next layer's norm may add them up.
    "experts.parts": life(("experts_up", "combine"), ("norm", "norm")),
    "experts.shared": life(("down", "combine")),
    "experts.shared_gate": life(("down", "combine")),
}
_LAST = ("last_attention", "last", "last_residual", "last_normed", "last_projected", "logits")


class ActivationArena:
    """Memory for the largest step, handed out as views of fewer rows; views are kept, since shapes recur."""

    def __init__(self, spec: ModelSpec, place: Placement, max_tokens: int, max_samples: int, up_width: int) -> None:
        self._spec, self.max_samples = spec, max_samples
        widths = _widths(spec, up_width)
        shapes = {name: (max_samples if name in _LAST else max_tokens, width) for name, width in widths.items()}
        fewer = _fewer_rows(spec, place, max_tokens)
        shapes |= {name: (rows, widths[name]) for name, rows in fewer.items()}
        if spec.experts is not None:
            shapes |= ExpertMemory.shapes(spec, max_tokens)
        tensors = _allocate(place, shapes, _lives(spec, in_pieces=fewer.get("activated", max_tokens) < max_tokens))
        self.num_bytes = tensors.pop("").nbytes
        self._rows = {name: tensor for name, tensor in tensors.items() if name in widths and name not in _LAST}
        self._rows |= self._inside(self._rows)
        self._samples = {name: tensors[name] for name in _LAST}
        self._experts = None if spec.experts is None else ExpertMemory(spec, place, max_tokens, tensors)
        if self._experts is not None:
            self.num_bytes += self._experts.num_bytes
        self._summands = torch.empty(linear_hopper.parts_size(place.device), dtype=torch.float32, device=place.device)
        self.num_bytes += self._summands.nbytes
        self._views: dict[tuple[int, int], Activations] = {}

    def _inside(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The buffers that are columns of others."""
        spec = self._spec
        if spec.parallel:
            attention, activated = rows["joint"].split([spec.q_size, spec.mlp_width], dim=1)
            return {"attention": attention, "activated": activated}
        return {"joint": rows["residual"][:, :0]}

    def views(self, tokens: int, samples: int) -> Activations:
        key = (tokens, samples)
        if key not in self._views:
            if len(self._views) >= 1024:
                self._views.clear()
            rows = {name: tensor[:tokens] for name, tensor in self._rows.items()}
            sampled = {name: tensor[:samples] for name, tensor in self._samples.items()}
            experts = None if self._experts is None else self._experts.views(tokens)
            self._views[key] = Activations(**rows, **sampled, summands=self._summands, experts=experts)
        return self._views[key]

    def tail(self, samples: int) -> Activations:
        """What the last layer works on behind its attention, for the sampled rows alone."""
        views = self.views(samples, samples)
        if self._spec.parallel:
            return replace(views, residual=views.last_residual, hidden=views.last)
        return replace(views, residual=views.last_residual, attention=views.last_attention)


def _fewer_rows(spec: ModelSpec, place: Placement, max_tokens: int) -> dict[str, int]:
    """Buffers that have fewer rows than a step has tokens, since an MLP is computed in pieces. Experts are not; of a
    parallel block, gate and up alone.
    """
    rows = rows_at_once(max_tokens, place.device)
    if spec.experts is not None or (spec.parallel and spec.mlp != "gated"):
        return {}
    return {"up": rows} | ({} if spec.parallel else {"activated": rows})


def _widths(spec: ModelSpec, up_width: int) -> dict[str, int]:
    """Of the buffers with memory of their own. In parallel blocks attention and MLP write side by side."""
    widths = dict.fromkeys(("hidden", "residual", "branch"), spec.hidden_size)
    widths["latent"] = 0 if spec.latent is None else spec.latent.width
    widths |= {"qkv": spec.q_size + 2 * spec.kv_size, "up": up_width}
    if spec.parallel:
        widths["joint"] = spec.q_size + spec.mlp_width
    else:
        widths |= {"attention": spec.q_size, "activated": spec.mlp_width}
    widths["last_attention"] = spec.q_size
    widths |= dict.fromkeys(("last", "last_residual", "last_normed"), spec.hidden_size)
    return widths | {"last_projected": spec.embedding_size, "logits": spec.vocab_span.size}


def _lives(spec: ModelSpec, in_pieces: bool) -> dict[str, Life]:
    lives = _LIVES | dict.fromkeys(_LAST, life(("end", "end")))
    lives |= {"last_attention": life(("output", "output")), "last_residual": life(("output", "end"))}
    if spec.parallel:
        lives["last"] = life(("output", "down"), ("end", "end"))  # at first as `hidden`
    lives["hidden"] = BLOCKS[spec.block].hidden_life
    if in_pieces:  # the first piece's results are there while the last one's are computed
        lives |= {name: lives[name] | life(("up", "down")) for name in ("hidden", "up") if "up" in lives[name]}
    if spec.shard is not None:  # sums of a half are on their way while the other half is computed
        lives["branch"] = ALWAYS
    if spec.experts is not None:  # they read what a dense MLP has done with by then
        lives["hidden"] |= life(("up", "experts_up"))
    return lives


def _allocate(
    place: Placement, shapes: Mapping[str, tuple[int, int]], lives: Mapping[str, Life]
) -> dict[str, torch.Tensor]:
    """A tensor for each shape, and under "" the memory that they share."""
    aligned = _ALIGNED // place.dtype.itemsize
    claims = {name: Claim(-(-rows * width // aligned) * aligned, lives[name]) for name, (rows, width) in shapes.items()}
    places = lay_out(claims)
    memory = place.empty(max(places[name] + claim.size for name, claim in claims.items()))
    memory.zero_()  # padding of a bucket reads what no step wrote, which must be finite
    tensors = {
        name: memory[places[name] : places[name] + rows * width].view(rows, width)
        for name, (rows, width) in shapes.items()
    }
    return {"": memory} | tensors
