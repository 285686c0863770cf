"""DeepSeek-V2 and V2-Lite: latent attention, shared experts without a gate, choices within groups of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import deepseek
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec

_DEFAULTS = {
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "num_experts_per_tok": 6,
}
_CHOICES = {"greedy": "greedy", "group_limited_greedy": "grouped"}


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader(config, {"n_routed_experts": ("num_experts",)})
    spec = replace(deepseek.read_spec(config, read), family="deepseek_v2", mlp_bias=read.flag("mlp_bias"))
    experts = deepseek.read_experts(config, read, spec.num_layers, _DEFAULTS)
    if experts is None:
        return spec
    read.choice("scoring_func", {"softmax": "softmax"}, "softmax")
    if read.flag("norm_topk_prob"):
        raise CheckpointError(
            "config.json: 'norm_topk_prob' must be false for DeepSeek-V2: the models' own code and the "
            "library's disagree about what it scales."
        )
    if read.choice("topk_method", _CHOICES, "greedy") == "grouped":
        experts = deepseek.in_groups(experts, read, 1, 1)
    return replace(spec, experts=experts)


FAMILY = Family(
    "deepseek_v2",
    ("DeepseekV2ForCausalLM",),
    read_spec,
    deepseek.weights,
    stacked=deepseek.stacked,
    apart=deepseek.apart,
)
