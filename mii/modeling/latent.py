"""Multi-head latent attention's own products: DeepSeek-V2 (arXiv 2405.04434, section 2.1).

    latent  = norm(x @ kv_down^T)          key of head h   = [rotate(x @ rope_down^T) | latent @ key_up[h]^T]
    q       = norm(x @ q_down^T)           value of head h = latent @ value_up[h]^T
    query of head h = [rotate(q @ rope_up[h]^T) | q @ query_up[h]^T], or of x itself

They are written out for every head, so that caching, rotation, attention, prefix reuse and the split over ranks are
those of all models: a head of the cache has its rotated elements first, and values are padded with zeros to the size of
keys. A token then takes as much of the cache as in a model without latents.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mii.modeling.layers import Norm
from mii.modeling.parameters import Linear, Module, Parameter, Piece, Placement
from mii.modeling.sharding import Span
from mii.modeling.spec import LatentSpec, ModelSpec


class LatentInputs(Module):
    """[all queries | all keys | all values] of the stream, by way of the latents."""

    def __init__(self, place: Placement, spec: ModelSpec, latent: LatentSpec) -> None:
        parts = {"q": latent.q_rank} if latent.q_rank else {}
        norms = replace(spec, norm_eps=latent.norm_eps)
        self.down = Linear(
            place, spec.hidden_size, {**parts, "kv": latent.kv_rank + latent.rope_size}, bias=latent.bias
        )
        self.q_norm = Norm(place, norms, latent.q_rank) if latent.q_rank else None
        self.kv_norm = Norm(place, norms, latent.kv_rank)
        self.queries = Linear(place, latent.q_rank or spec.hidden_size, {"": spec.q_span})
        self.keys_values = KeysValues(place, spec, latent)
        self._q_size, self._q_rank, self._kv_rank = spec.q_size, latent.q_rank, latent.kv_rank

    def __call__(self, out: torch.Tensor, latents: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Writes `out` [tokens, queries + keys + values] and returns it; `latents` is scratch, [tokens, width]."""
        self.down(latents, x)
        q, kv = latents[:, : self._q_rank], latents[:, self._q_rank :]
        if self.q_norm is not None:
            self.q_norm(q, q)
        self.kv_norm(kv[:, : self._kv_rank], kv[:, : self._kv_rank])
        self.queries(out[:, : self._q_size], x if self.q_norm is None else q)
        self.keys_values(out[:, self._q_size :], kv)
        return out


class KeysValues(Linear):
    """[all keys | all values] of [latent | rotated elements]. The latter pass into each key through ones in the matrix,
    and what pads a value comes of zeros.
    """

    def __init__(self, place: Placement, spec: ModelSpec, latent: LatentSpec) -> None:
        super().__init__(place, latent.kv_rank + latent.rope_size, {"k": spec.kv_span, "v": spec.kv_span})
        tensor = self.weight.tensor.zero_()
        keys = tensor[: spec.kv_size].view(-1, latent.head_size, tensor.shape[1])
        ones = torch.eye(latent.rope_size, dtype=place.dtype, device=place.device)
        keys[:, : latent.rope_size, latent.kv_rank :] = ones
        self.weight = KeyValueParameter(tensor, spec.q_heads_span, latent)


class KeyValueParameter(Parameter):
    """What makes keys and values of the latent. A checkpoint has both of each head one after the other, [heads * (key +
    value), rank], or apart: "k" is [heads, rank, key] and "v" [heads, value, rank].
    """

    __slots__ = ("_heads", "_latent")

    def __init__(self, tensor: torch.Tensor, heads: Span, latent: LatentSpec) -> None:
        super().__init__(tensor, dict.fromkeys("kv", heads.size * latent.head_size))
        self._heads, self._latent = heads, latent

    def whole_shape(self, part: str = "") -> tuple[int, ...]:
        heads, latent = self._heads.whole, self._latent
        if part == "k":
            return (heads, latent.kv_rank, latent.plain_size)
        if part == "v":
            return (heads, latent.value_size, latent.kv_rank)
        return (heads * (latent.plain_size + latent.value_size), latent.kv_rank)

    def pieces(self, part: str = "") -> list[Piece]:
        found, latent = [], self._latent
        keys, values = self.tensor[:, : latent.kv_rank].view(2, self._heads.size, latent.head_size, -1)
        for head, (key, value) in enumerate(zip(keys, values, strict=True), self._heads.start):
            key, value = key[latent.rope_size :], value[: latent.value_size]
            if part == "k":
                found.append(Piece(key.t()[None], slice(head, head + 1)))
            elif part == "v":
                found.append(Piece(value[None], slice(head, head + 1)))
            else:
                first = head * (len(key) + len(value))
                found.append(Piece(key, slice(first, first + len(key))))
                found.append(Piece(value, slice(first + len(key), first + len(key) + len(value))))
        return found


class PaddedOutput(Linear):
    """The output projection of values that are padded: their padding meets zeros."""

    def __init__(self, place: Placement, spec: ModelSpec, latent: LatentSpec) -> None:
        super().__init__(place, spec.q_span, {"": spec.hidden_size}, bias=spec.output_bias)
        self.weight = PaddedColumns(self.weight.tensor.zero_(), spec.q_heads_span, latent)


class PaddedColumns(Parameter):
    """A matrix of which a checkpoint has the columns of each head without padding, [out_features, heads * value]."""

    __slots__ = ("_heads", "_latent")

    def __init__(self, tensor: torch.Tensor, heads: Span, latent: LatentSpec) -> None:
        super().__init__(tensor)
        self._heads, self._latent = heads, latent

    def whole_shape(self, part: str = "") -> tuple[int, ...]:
        return (self.tensor.shape[0], self._heads.whole * self._latent.value_size)

    def pieces(self, part: str = "") -> list[Piece]:
        size = self._latent.value_size
        columns = self.tensor.view(self.tensor.shape[0], self._heads.size, -1)[:, :, :size]
        heads = range(self._heads.start, self._heads.stop)
        return [Piece(columns[:, i], slice(head * size, (head + 1) * size), 1) for i, head in enumerate(heads)]
