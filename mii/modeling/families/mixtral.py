"""Mixtral: Mistral's wiring with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import llama, mistral
from mii.modeling.families.base import Family, Target
from mii.modeling.families.expert_names import expert_targets, stacked_targets
from mii.modeling.spec import ExpertsSpec, ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader(config, {"num_local_experts": ("num_experts",)})
    theta = {"rope_theta": config.get("rope_theta") or 1e6}
    spec = mistral.read_spec({"rms_norm_eps": 1e-5, "sliding_window": None, **config, **theta})
    experts = ExpertsSpec(
        count=read.integer("num_local_experts", 8),
        top_k=read.integer("num_experts_per_tok", 2),
        intermediate_size=spec.intermediate_size,
        layers=(True,) * spec.num_layers,
    )
    return replace(spec, family="mixtral", experts=read.experts(experts))


def weights(spec: ModelSpec) -> dict[str, Target]:
    return llama.weights(spec) | expert_targets(spec, "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})


def stacked(spec: ModelSpec) -> dict[str, Target]:
    return llama.weights(spec) | stacked_targets(spec)


FAMILY = Family("mixtral", ("MixtralForCausalLM",), read_spec, weights, stacked=stacked)
