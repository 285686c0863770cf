"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's wiring with experts, one of them shared by all tokens behind a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import qwen2, qwen_moe
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec

_DEFAULTS = {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    spec, read = qwen2.read_spec({"num_key_value_heads": 16, **config}), ConfigReader(config)
    experts = qwen_moe.read_experts(config, spec.num_layers, _DEFAULTS)
    if experts is not None:
        experts = replace(experts, shared_size=read.integer("shared_expert_intermediate_size", 5632))
    return replace(
        spec,
        family="qwen2_moe",
        qkv_bias=read.flag("qkv_bias", True),
        windows=qwen2.windows(config, spec.num_layers, lambda layer, first: layer % 2 == 0 and layer < first),
        experts=experts,
    )


FAMILY = Family("qwen2_moe", ("Qwen2MoeForCausalLM",), read_spec, qwen_moe.weights, stacked=qwen_moe.stacked)
