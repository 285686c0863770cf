"""Qwen, the first generation: Llama's wiring under names of its own, with one biased matrix of queries, keys, values.

Past the length it was trained on (`seq_length`) Qwen changes the base of its rotation by the prompt's length
(`use_dynamic_ntk`) and scales queries by their position (`use_logn_attn`). Up to there both do nothing, and that is how
far it is served where either is on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.families.base import Family, Target
from mii.modeling.rope import read_rope
from mii.modeling.spec import ConfigReader, ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader(config)
    q_heads, head_dim = read.required_integer("num_attention_heads"), read.integer("kv_channels", 128)
    layers, up = read.required_integer("num_hidden_layers"), read.required_integer("intermediate_size")
    if up % 2:
        raise CheckpointError(f"config.json: 'intermediate_size' counts gate and up, so {up} must be even.")
    if not read.flag("scale_attn_weights", True):
        raise CheckpointError(
            "config.json: 'scale_attn_weights' is false; scores without their scale are not supported."
        )
    rotary = {
        "rope_theta": read.number("rotary_emb_base", 10000.0),
        "partial_rotary_factor": read.number("rotary_pct", 1.0),
    }
    plain = read.flag("no_bias", True)
    return ModelSpec(
        family="qwen",
        vocab_size=read.required_integer("vocab_size"),
        hidden_size=read.required_integer("hidden_size"),
        num_layers=layers,
        q_heads=q_heads,
        kv_heads=q_heads,
        head_dim=head_dim,
        intermediate_size=up // 2,
        max_positions=_positions(read),
        norm_eps=read.number("layer_norm_epsilon", 1e-6),
        activation="silu",
        rope=read_rope(rotary, head_dim),
        windows=(0,) * layers,
        attention_scale=head_dim**-0.5,
        qkv_bias=True,
        output_bias=not plain,
        mlp_bias=not plain,
        tied_embeddings=read.flag("tie_word_embeddings"),
    )


def _positions(read: ConfigReader) -> int:
    trained = read.integer("seq_length", 2048)
    changes = read.flag("use_dynamic_ntk", True) or read.flag("use_logn_attn", True)
    return trained if changes else read.integer("max_position_embeddings", trained)


def weights(spec: ModelSpec) -> dict[str, Target]:
    targets = {"transformer.wte.weight": Target("embedding.weight"), "transformer.ln_f.weight": Target("norm.weight")}
    if not spec.tied_embeddings:
        targets["lm_head.weight"] = Target("head.weight")
    for layer in range(spec.num_layers):
        source, block = f"transformer.h.{layer}", f"blocks.{layer}"
        for name, path, part, biased in _LAYER:
            targets[f"{source}.{name}.weight"] = Target(f"{block}.{path}.weight", part)
            if biased and getattr(spec, biased):
                targets[f"{source}.{name}.bias"] = Target(f"{block}.{path}.bias", part)
    return targets


_LAYER = (
    ("ln_1", "attention_norm", "", ""),
    ("attn.c_attn", "attention.qkv", "", "qkv_bias"),
    ("attn.c_proj", "attention.output", "", "output_bias"),
    ("ln_2", "mlp_norm", "", ""),
    ("mlp.w2", "mlp.up", "gate", "mlp_bias"),
    ("mlp.w1", "mlp.up", "up", "mlp_bias"),
    ("mlp.c_proj", "mlp.down", "", "mlp_bias"),
)

FAMILY = Family(
    "qwen",
    ("QWenLMHeadModel",),
    read_spec,
    weights,
    ignored=(".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", ".logn_tensor"),
)
