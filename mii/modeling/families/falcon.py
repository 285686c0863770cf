"""Falcon: 7B (one key head, one norm, parallel), the new decoder of 40B, 180B and 11B (grouped heads, one or two
norms), and the models of RefinedWeb (ALiBi, sequential).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.alibi import alibi_slopes
from mii.modeling.config_reader import ACTIVATIONS, ConfigReader
from mii.modeling.families.base import Family, Target
from mii.modeling.families.names import grouped_rows, joint_layer, targets_by_role
from mii.modeling.rope import context_length, read_rope
from mii.modeling.spec import ModelSpec

_ALIASES = {
    "hidden_size": ("n_embed",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "num_kv_heads": ("n_head_kv",),
}


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """`new_decoder_architecture` outweighs `multi_query` and `parallel_attn`, as in transformers. ALiBi is scaled as
    the scores are that it is added to; unlike there slopes times positions are not rounded to bfloat16, which far from
    the start of a text makes neighbouring keys alike (logits of RW models differ by that from transformers').
    """
    read = ConfigReader(config, _ALIASES)
    sizes = ConfigReader({**read.config, "num_key_value_heads": _key_heads(read), "head_dim": None}).sizes()
    alibi, bias = read.flag("alibi"), read.flag("bias")
    rope = None if alibi else read_rope(config, sizes["head_dim"])
    slopes = alibi_slopes(sizes["q_heads"]) if alibi else ()
    return ModelSpec(
        family="falcon",
        **sizes,
        intermediate_size=read.integer("ffn_hidden_size", 4 * sizes["hidden_size"]),
        max_positions=context_length(rope, read.integer("max_position_embeddings", 2048)),
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        activation=read.choice("activation", ACTIVATIONS, "gelu"),
        rope=rope,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tied_embeddings=read.flag("tie_word_embeddings", True),
        norm="layer",
        norm_bias=True,
        block=_block(read),
        mlp="plain",
        alibi_slopes=tuple(sizes["attention_scale"] * slope for slope in slopes),
    )


def _key_heads(read: ConfigReader) -> int:
    """Key/value heads: groups in the new decoder, before it one or as many as there are query heads."""
    q_heads = read.required_integer("num_attention_heads")
    if _is_new(read):
        return read.integer("num_kv_heads", q_heads)
    return 1 if read.flag("multi_query", True) else q_heads


def _is_new(read: ConfigReader) -> bool:
    return read.flag("new_decoder_architecture", "n_head_kv" in read.config)


def _block(read: ConfigReader) -> str:
    new, norms = _is_new(read), read.integer("num_ln_in_parallel_attn", 2 if _is_new(read) else 1)
    if norms > 2 or (norms == 2 and not new):
        raise CheckpointError(
            f"config.json: 'num_ln_in_parallel_attn' is {norms}; it can be 1, or 2 with 'new_decoder_architecture'."
        )
    if not new and not read.flag("parallel_attn", True):
        return "sequential"
    return "parallel_two_norms" if norms == 2 else "parallel"


def weights(spec: ModelSpec) -> dict[str, Target]:
    names = _LAYER | _NORMS[spec.block]
    return targets_by_role(spec, _OUTER, names, qkv_rows=grouped_rows(spec.q_heads, spec.kv_heads, spec.head_dim))


_OUTER = {"embedding": "transformer.word_embeddings", "norm": "transformer.ln_f", "head": "lm_head"}
_BLOCK = "transformer.h.{layer}."
_LAYER = joint_layer(_BLOCK + "self_attention")
_NORMS = {
    "sequential": {"attention norm": _BLOCK + "input_layernorm", "mlp norm": _BLOCK + "post_attention_layernorm"},
    "parallel": {"attention norm": _BLOCK + "input_layernorm"},
    "parallel_two_norms": {"attention norm": _BLOCK + "ln_attn", "mlp norm": _BLOCK + "ln_mlp"},
}

FAMILY = Family("falcon", ("FalconForCausalLM", "RWForCausalLM"), read_spec, weights)
