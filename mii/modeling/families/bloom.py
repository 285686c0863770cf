"""Bloom: ALiBi in place of positions, and a norm behind the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.alibi import alibi_slopes
from mii.modeling.config_reader import ConfigReader
from mii.modeling.families.base import Family, Target
from mii.modeling.families.names import below, grouped_rows, joint_layer, targets_by_role
from mii.modeling.spec import ModelSpec

_ALIASES = {
    "hidden_size": ("n_embed", "n_embd"),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
}


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Bloom's config names no longest context: `seq_length` is what it was trained on, 2048 where that is missing."""
    read = ConfigReader(config, _ALIASES)
    sizes = read.sizes(grouped=False)
    hidden = sizes["hidden_size"]
    inner = read.integer("n_inner", 4 * hidden)
    if inner != 4 * hidden:
        raise CheckpointError(f"config.json: 'n_inner' is {inner}; in Bloom it is 4 times the hidden size {hidden}.")
    return ModelSpec(
        family="bloom",
        **sizes,
        intermediate_size=inner,
        max_positions=read.integer("seq_length", 2048),
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        rope=None,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_embeddings=read.flag("tie_word_embeddings", True),
        norm="layer",
        norm_bias=True,
        block="normed_residual" if read.flag("apply_residual_connection_post_layernorm") else "sequential",
        mlp="plain",
        embedding_norm=True,
        alibi_slopes=alibi_slopes(sizes["q_heads"]),
    )


def weights(spec: ModelSpec) -> dict[str, Target]:
    return targets_by_role(spec, _OUTER, _LAYER, qkv_rows=grouped_rows(spec.q_heads, spec.kv_heads, spec.head_dim))


_OUTER = {
    "embedding": "transformer.word_embeddings",
    "embedding norm": "transformer.word_embeddings_layernorm",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_BLOCK = "transformer.h.{layer}."
_LAYER = {
    **joint_layer(_BLOCK + "self_attention"),
    "attention norm": _BLOCK + "input_layernorm",
    "mlp norm": _BLOCK + "post_attention_layernorm",
}

FAMILY = Family("bloom", ("BloomForCausalLM",), read_spec, weights, canonical=below("transformer."))
