"""Qwen3: Llama's wiring with a norm of every query and key head, and Qwen2's windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.modeling.families import llama, qwen2
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    spec = llama.read_spec({**qwen2.DEFAULTS, "head_dim": 128, **config, "mlp_bias": False})
    return replace(spec, family="qwen3", head_norm=True, windows=qwen2.windows(config, spec.num_layers))


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), read_spec, llama.weights)
