"""OPT: learned positions, LayerNorm and a plain MLP. OPT-350m norms after each addition and projects its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mii.modeling.config_reader import ACTIVATIONS, ConfigReader
from mii.modeling.families.base import Family, Target
from mii.modeling.families.names import below, targets_by_role
from mii.modeling.spec import ModelSpec

_POSITION_OFFSET = 2  # the table's first rows are those of padding


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader(config)
    sizes = read.sizes(grouped=False)
    hidden = sizes["hidden_size"]
    norm_first, affine, bias = (
        read.flag(name, True) for name in ("do_layer_norm_before", "layer_norm_elementwise_affine", "enable_bias")
    )
    embedding_size = read.integer("word_embed_proj_dim", hidden)
    positions = read.integer("max_position_embeddings", 2048)
    return ModelSpec(
        family="opt",
        **sizes,
        intermediate_size=read.required_integer("ffn_dim"),
        max_positions=positions,
        norm_eps=1e-5,
        activation=read.choice("activation_function", ACTIVATIONS, "relu"),
        rope=None,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tied_embeddings=read.flag("tie_word_embeddings", True),
        norm="layer",
        norm_weight=affine,
        norm_bias=affine,
        final_norm=norm_first and not read.flag("_remove_final_layer_norm"),
        block="sequential" if norm_first else "post_norm",
        mlp="plain",
        embedding_size=0 if embedding_size == hidden else embedding_size,
        learned_positions=positions + _POSITION_OFFSET,
        position_offset=_POSITION_OFFSET,
    )


def weights(spec: ModelSpec) -> dict[str, Target]:
    outer = {"embedding": "model.decoder.embed_tokens", "positions": "model.decoder.embed_positions", "head": "lm_head"}
    if spec.final_norm:
        outer["norm"] = "model.decoder.final_layer_norm"
    if spec.embedding_size:
        outer |= {"projection in": "model.decoder.project_in", "projection out": "model.decoder.project_out"}
    return targets_by_role(spec, outer, _LAYER)


_BLOCK = "model.decoder.layers.{layer}."
_LAYER = {
    "attention norm": _BLOCK + "self_attn_layer_norm",
    "q": _BLOCK + "self_attn.q_proj",
    "k": _BLOCK + "self_attn.k_proj",
    "v": _BLOCK + "self_attn.v_proj",
    "attention output": _BLOCK + "self_attn.out_proj",
    "mlp norm": _BLOCK + "final_layer_norm",
    "up": _BLOCK + "fc1",
    "down": _BLOCK + "fc2",
}

FAMILY = Family("opt", ("OPTForCausalLM",), read_spec, weights, canonical=below("model."))
