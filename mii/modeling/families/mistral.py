"""Mistral: Llama's wiring with a sliding window on every layer, no biases, and a norm epsilon of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.families import llama
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    config = {**_DEFAULTS, **config, "attention_bias": False, "mlp_bias": False}
    spec = llama.read_spec(config)
    return replace(spec, family="mistral", windows=llama.windows(config, spec.num_layers))


_DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}

FAMILY = Family("mistral", ("MistralForCausalLM",), read_spec, llama.weights)
