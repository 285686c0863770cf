"""What a family reads out of a checkpoint's config: everything the layer library needs to know, and nothing about
names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mii.modeling.sharding import Shard, Span, split, split_heads


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions. `kind` and `scaling` are as in `rope_scaling` / `rope_parameters` of a Hugging Face config."""

    theta: float
    rotary_dim: int
    kind: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of experts in place of the MLP of some layers.

    Args:
        count: Experts of a layer. top_k: How many a token goes to.
        intermediate_size: Width of one expert.
        layers: For each layer whether it has experts; the others have a dense MLP of the model's `intermediate_size`.
        scoring, renormalise, scale, groups, top_groups: As in `mii.ops.moe_routing.Routing`.
        choice_bias: Whether each expert has a number that is added to its score for the choice only.
        shared_size: Width of an expert that every token goes to besides, 0 for none. shared_gate: Whether that is
            behind a sigmoid gate.
        columns, shared_columns: Which columns of an expert, and of the shared one, a rank of a group has; the sizes are
            then that rank's. None: all.
    """

    count: int
    top_k: int
    intermediate_size: int
    layers: tuple[bool, ...]
    scoring: str = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    choice_bias: bool = False
    shared_size: int = 0
    shared_gate: bool = True
    columns: Span | None = None
    shared_columns: Span | None = None

    @property
    def span(self) -> Span:
        """Columns of an expert."""
        return self.columns or Span.all_of(self.intermediate_size)

    @property
    def shared_span(self) -> Span:
        """Columns of the shared expert."""
        return self.shared_columns or Span.all_of(self.shared_size)

    def sharded(self, rank: int, size: int) -> ExpertsSpec:
        """What one rank of a group has: some columns of every expert."""
        columns = split(self.intermediate_size, rank, size)
        shared = split(self.shared_size, rank, size) if self.shared_size else None
        return replace(
            self,
            intermediate_size=columns.size,
            shared_size=shared.size if shared else 0,
            columns=columns,
            shared_columns=shared,
        )


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention: low-rank latents that queries, keys and values are made of (DeepSeek-V2, arXiv
    2405.04434, section 2.1).

    Args:
        kv_rank: Width of the latent of keys and values. q_rank: That of the queries', 0: they are made of the stream.
        rope_size: Rotated elements of a head; the keys of all heads share them. plain_size: The other elements.
        value_size: Elements of a head's value.
        norm_eps: Of the latents' norms.
        bias: Whether the products that give latents have biases.
    """

    kv_rank: int
    q_rank: int
    rope_size: int
    plain_size: int
    value_size: int
    norm_eps: float
    bias: bool = False

    @property
    def head_size(self) -> int:
        """Elements of a query or a key, and of a value with its padding."""
        return self.rope_size + self.plain_size

    @property
    def width(self) -> int:
        """Of a token's latents, those of the queries and the shared part of the keys among them."""
        return self.q_rank + self.kv_rank + self.rope_size


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape and the wiring options of a decoder. Sizes count elements.

    Args:
        rope: Rotary positions, None for none. layer_ropes: One entry a layer, where layers differ.
        windows: One entry a layer, 0 for none.
        head_norm: Norm the elements of each query and key head. row_norm: Norm all query heads, and all key heads,
            together.
        attention_softcap, logit_softcap: Bound c of scores and of logits, c * tanh(x / c); 0 for none.
        embedding_scale: Factor on the embeddings, rounded to the model's dtype before it is used.
        norm: Kind of the norms, a name of `mii.ops.abi.NORMS`; `norm_weight` and `norm_bias` say what they hold.
        block: How norms, attention and MLP are wired, a name of `mii.modeling.blocks.BLOCKS`.
        mlp: Kind of the MLP: "gated" or "plain".
        experts: What some layers have in place of the MLP, None for none.
        latent: How queries, keys and values come out of latents, None: out of the stream.
        embedding_size: Width of the token embeddings where they are projected to the hidden size and back; 0: as wide.
        learned_positions: Rows of the table of learned positions, 0 for none; a position's row is `position_offset` on.
        alibi_slopes: Slope of each query head, empty for none.
        log_length: Queries at positions from this one on grow by the logarithm of their context's length to this base
            (log-n attention); 0 for none.
        layer_scales: Factor on `attention_scale` for each layer, empty for none.
        shard: The part of the model that one rank of a group has; the counts of heads and `intermediate_size` are then
            that rank's, and the spans say where they lie in the whole. None: all of it.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    activation: str
    rope: RopeSpec | None
    windows: tuple[int, ...]
    attention_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    head_bias: bool = False
    norm: str = "rms"
    norm_weight: bool = True
    norm_bias: bool = False
    final_norm: bool = True
    block: str = "sequential"
    mlp: str = "gated"
    experts: ExpertsSpec | None = None
    latent: LatentSpec | None = None
    embedding_size: int = 0
    embedding_norm: bool = False
    learned_positions: int = 0
    position_offset: int = 0
    alibi_slopes: tuple[float, ...] = ()
    log_length: int = 0
    layer_scales: tuple[float, ...] = ()
    layer_ropes: tuple[RopeSpec | None, ...] = ()
    head_norm: bool = False
    row_norm: bool = False
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    shard: Shard | None = None

    @property
    def ropes(self) -> tuple[RopeSpec | None, ...]:
        """The rotation of every layer."""
        return self.layer_ropes or (self.rope,) * self.num_layers

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a layer are added to the stream in one product."""
        return self.block.startswith("parallel")

    @property
    def mlp_width(self) -> int:
        """What the widest dense MLP has between its products."""
        experts = self.experts
        if experts is None:
            return self.intermediate_size
        return max(experts.shared_size, 0 if all(experts.layers) else self.intermediate_size)

    @property
    def q_size(self) -> int:
        return self.q_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def q_heads_span(self) -> Span:
        """Query heads."""
        return self.shard.q_heads if self.shard else Span.all_of(self.q_heads)

    @property
    def q_span(self) -> Span:
        """Query features, of all heads side by side."""
        return self.q_heads_span.times(self.head_dim)

    @property
    def kv_span(self) -> Span:
        """Key (or value) features, of all heads side by side."""
        return self.shard.kv_heads.times(self.head_dim) if self.shard else Span.all_of(self.kv_size)

    @property
    def mlp_span(self) -> Span:
        """Columns between the MLP's products."""
        return self.shard.columns if self.shard else Span.all_of(self.intermediate_size)

    @property
    def vocab_span(self) -> Span:
        """Tokens whose logits are computed here."""
        return self.shard.vocabulary if self.shard else Span.all_of(self.vocab_size)

    def sharded(self, rank: int, size: int) -> ModelSpec:
        """What one rank of a tensor-parallel group has of this model.

        Raises:
            PlacementError: the model cannot be divided among so many.
        """
        if size == 1:
            return self
        q_heads, kv_heads = split_heads(self.q_heads, self.kv_heads, rank, size)
        columns = split(self.intermediate_size, rank, size)
        return replace(
            self,
            q_heads=q_heads.size,
            kv_heads=kv_heads.size,
            intermediate_size=columns.size,
            alibi_slopes=self.alibi_slopes[q_heads.slice],
            experts=None if self.experts is None else self.experts.sharded(rank, size),
            shard=Shard(rank, size, q_heads, kv_heads, columns, split(self.vocab_size, rank, size)),
        )

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of keys and values that one token takes over all layers."""
        return 2 * self.num_layers * self.kv_size * element_size
