"""What Qwen's families with experts share: which layers have them, and their fields of the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import llama
from mii.modeling.families.base import Target
from mii.modeling.families.expert_names import expert_targets, stacked_targets
from mii.modeling.spec import ExpertsSpec, ModelSpec


def read_experts(config: Mapping[str, Any], layers: int, defaults: Mapping[str, int]) -> ExpertsSpec | None:
    """The experts of a config, None where no layer has any.

    Args:
        defaults: What the family takes for fields that the config leaves out.
    """
    read = ConfigReader(config, {"num_experts": ("num_local_experts",)})
    dense = read.layers("mlp_only_layers", layers)
    step = read.integer("decoder_sparse_step", 1)
    sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    if config.get("num_experts") == 0 or not any(sparse):
        return None
    return read.experts(
        ExpertsSpec(
            count=read.integer("num_experts", defaults["num_experts"]),
            top_k=read.integer("num_experts_per_tok", defaults["num_experts_per_tok"]),
            intermediate_size=read.integer("moe_intermediate_size", defaults["moe_intermediate_size"]),
            layers=sparse,
            renormalise=read.flag("norm_topk_prob"),
        )
    )


def weights(spec: ModelSpec) -> dict[str, Target]:
    return llama.weights(spec) | (expert_targets(spec) if spec.experts else {})


def stacked(spec: ModelSpec) -> dict[str, Target]:
    return llama.weights(spec) | (stacked_targets(spec) if spec.experts else {})
