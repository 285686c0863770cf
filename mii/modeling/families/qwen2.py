"""Qwen2 and Qwen2.5: Llama's wiring with biases of queries, keys and values, and windows in the upper layers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import llama
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    spec = llama.read_spec({**DEFAULTS, **config, "attention_bias": False, "mlp_bias": False})
    return replace(spec, family="qwen2", qkv_bias=True, windows=windows(config, spec.num_layers))


def windows(
    config: Mapping[str, Any], layers: int, slides: Callable[[int, int], bool] = operator.ge
) -> tuple[int, ...]:
    """Qwen's windows: off unless `use_sliding_window`, and then in the layers from `max_window_layers` on.

    Args:
        slides: Whether a layer has one, by its number and `max_window_layers`, where `layer_types` is missing.
    """
    read = ConfigReader(config)
    first = read.config.get("max_window_layers")
    first = 28 if first is None else 0 if first == 0 else read.required_integer("max_window_layers")
    sliding = llama.sliding_layers(config, layers, lambda layer: slides(layer, first))
    if not read.flag("use_sliding_window"):
        return (0,) * layers
    return llama.windows({"sliding_window": 4096, **config}, layers, sliding)


DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}

FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), read_spec, llama.weights)
