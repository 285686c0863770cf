"""Qwen3-MoE: Qwen3's wiring with experts, and a window in all layers or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import llama, qwen_moe
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec

_DEFAULTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    defaults = {"max_position_embeddings": 32768, "num_key_value_heads": 4}
    spec = llama.read_spec({**defaults, **config, "mlp_bias": False})
    slides = ConfigReader(config).flag("use_sliding_window")
    return replace(
        spec,
        family="qwen3_moe",
        head_norm=True,
        windows=llama.windows({"sliding_window": 4096, **config} if slides else {}, spec.num_layers),
        experts=qwen_moe.read_experts(config, spec.num_layers, _DEFAULTS),
    )


FAMILY = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), read_spec, qwen_moe.weights, stacked=qwen_moe.stacked)
