"""Gemma 1: Llama's wiring with scaled embeddings, norms by 1 + weight, and heads of their own size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.config_reader import ACTIVATIONS, ConfigReader
from mii.modeling.families import llama
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    # The releases say "gelu" and mean its approximation, which later ones name in a field of its own.
    act = config.get("hidden_activation") or config.get("hidden_act")
    act = "gelu_pytorch_tanh" if act in (None, "gelu") else act
    return replace(common_spec({**config, "hidden_activation": act}), family="gemma")


def common_spec(config: Mapping[str, Any]) -> ModelSpec:
    """What the three generations share."""
    config = {**_DEFAULTS, **config}
    read = ConfigReader(config)
    if read.flag("use_bidirectional_attention"):
        raise CheckpointError("config.json: 'use_bidirectional_attention' is true; only causal models can generate.")
    spec = llama.read_spec({**config, "hidden_act": None, "mlp_bias": False})
    return replace(
        spec,
        activation=read.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        max_positions=read.required_integer("max_position_embeddings"),
        norm="rms_plus1",
        embedding_scale=spec.hidden_size**0.5,
    )


_DEFAULTS = {"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}

FAMILY = Family("gemma", ("GemmaForCausalLM",), read_spec, llama.weights)
