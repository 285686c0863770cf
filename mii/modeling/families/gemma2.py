"""Gemma 2: Gemma with a norm after each branch too, soft caps, a scale of its own, and windows in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import gemma, llama
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    config = {**_DEFAULTS, **config}
    spec, read = gemma.common_spec(config), ConfigReader(config)
    sliding = llama.sliding_layers(config, spec.num_layers, lambda layer: layer % 2 == 0)
    return replace(
        spec,
        family="gemma2",
        block="sandwich",
        windows=llama.windows(config, spec.num_layers, sliding),
        attention_scale=read.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=read.number("attn_logit_softcapping", 0.0),
        logit_softcap=read.number("final_logit_softcapping", 0.0),
    )


_DEFAULTS = {
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}

FAMILY = Family("gemma2", ("Gemma2ForCausalLM",), read_spec, llama.weights)
