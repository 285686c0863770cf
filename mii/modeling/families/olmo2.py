"""OLMo-2: Llama's layers with norms of what they add, not of what they take, and of all queries and all keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.families import llama
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    if config.get("clip_qkv") is not None:
        raise CheckpointError(f"config.json: 'clip_qkv' must be null for OLMo-2, and it is {config['clip_qkv']!r}.")
    spec = llama.read_spec({"rms_norm_eps": 1e-5, **config, "mlp_bias": False})
    return replace(spec, family="olmo2", block="normed_branch", row_norm=True)


FAMILY = Family("olmo2", ("Olmo2ForCausalLM",), read_spec, llama.weights)
