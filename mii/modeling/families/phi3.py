"""Phi-3, Phi-3.5 and Phi-4: Llama's wiring with fused projections, LongRoPE, and in Phi-4-mini partly rotated heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import llama
from mii.modeling.families.base import Family, Target
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    config = {**_DEFAULTS, **config, "attention_bias": False, "mlp_bias": False}
    for form in ("rope_scaling", "rope_parameters"):
        scaling = ConfigReader(config).fields(form)
        if "yarn" in (scaling.get("type"), scaling.get("rope_type")):  # what the first of these models called it
            config[form] = {**scaling, "type": "longrope", "rope_type": "longrope"}
    spec = llama.read_spec(config)
    return replace(spec, family="phi3", windows=llama.windows(config, spec.num_layers))


_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}


def weights(spec: ModelSpec) -> dict[str, Target]:
    """Llama's, but for the projections that are stored as they are used, in one."""
    split = (".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".gate_proj.weight", ".up_proj.weight")
    targets = {name: target for name, target in llama.weights(spec).items() if not name.endswith(split)}
    for layer in range(spec.num_layers):
        source, target = f"model.layers.{layer}", f"blocks.{layer}"
        targets[f"{source}.self_attn.qkv_proj.weight"] = Target(f"{target}.attention.qkv.weight")
        targets[f"{source}.mlp.gate_up_proj.weight"] = Target(f"{target}.mlp.up.weight")
    return targets


FAMILY = Family("phi3", ("Phi3ForCausalLM",), read_spec, weights)
