"""Qwen, the first generation: Llama's wiring under names of its own, with one biased matrix of queries, keys, values.

Past the length it was trained on (`seq_length`) Qwen rotates a prompt and its answer by a base that follows from the
prompt's length (`use_dynamic_ntk`) and scales queries by their position (`use_logn_attn`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.config_reader import ConfigReader
from mii.modeling.families.base import Family, Target
from mii.modeling.rope import read_rope
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader(config, {"head_dim": ("kv_channels",)})
    sizes = ConfigReader({"head_dim": 128, **read.config, "num_key_value_heads": None}).sizes()
    up, trained = read.required_integer("intermediate_size"), read.integer("seq_length", 2048)
    if up % 2:
        raise CheckpointError(f"config.json: 'intermediate_size' counts gate and up, so {up} must be even.")
    if not read.flag("scale_attn_weights", True):
        raise CheckpointError(
            "config.json: 'scale_attn_weights' is false; scores without their scale are not supported."
        )
    rotary = {
        "rope_theta": read.number("rotary_emb_base", 10000.0),
        "partial_rotary_factor": read.number("rotary_pct", 1.0),
        "rope_scaling": {"type": "prompt_ntk"} if read.flag("use_dynamic_ntk", True) else None,
        "max_position_embeddings": trained,
    }
    plain = read.flag("no_bias", True)
    return ModelSpec(
        family="qwen",
        **sizes,
        intermediate_size=up // 2,
        max_positions=read.integer("max_position_embeddings", trained),
        norm_eps=read.number("layer_norm_epsilon", 1e-6),
        activation="silu",
        rope=read_rope(rotary, sizes["head_dim"]),
        qkv_bias=True,
        output_bias=not plain,
        mlp_bias=not plain,
        tied_embeddings=read.flag("tie_word_embeddings"),
        log_length=trained if read.flag("use_logn_attn", True) else 0,
    )


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
