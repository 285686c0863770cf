"""DeepSeek-V3 and what has its wiring (Moonlight): V2's with sigmoid scores, and biases that balance the choice.

Weights in 8 bits and layers that predict further tokens are not served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import deepseek
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec

_DEFAULTS = {
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
}


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    config = {"max_position_embeddings": 4096, "routed_scaling_factor": 2.5, **config}
    read = ConfigReader(config, {"n_routed_experts": ("num_local_experts",)})
    spec = replace(deepseek.read_spec(config, read), family="deepseek_v3")
    if spec.rope is not None:
        spec = replace(spec, rope=replace(spec.rope, interleaved=read.flag("rope_interleave", True)))
    experts = deepseek.read_experts(config, read, spec.num_layers, _DEFAULTS)
    if experts is None:
        return spec
    read.choice("topk_method", {"noaux_tc": "noaux_tc"}, "noaux_tc")
    experts = replace(
        experts,
        scoring=read.choice("scoring_func", {"sigmoid": "sigmoid"}, "sigmoid"),
        renormalise=read.flag("norm_topk_prob", True),
        choice_bias=True,
    )
    return replace(spec, experts=deepseek.in_groups(experts, read, 8, 4))


FAMILY = Family(
    "deepseek_v3",
    ("DeepseekV3ForCausalLM",),
    read_spec,
    deepseek.weights,
    stacked=deepseek.stacked,
    apart=deepseek.apart,
    left_out=("model.layers.61.",),  # of the released models: behind their last layer, and predicts a further token
)
