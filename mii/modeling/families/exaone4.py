"""EXAONE-4: norms of what the layers add and of each query and key head; where some layers have windows, only they
rotate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.families import llama
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    config = {**_DEFAULTS, **config, "attention_bias": False, "mlp_bias": False}
    spec = llama.read_spec(config)
    spec = replace(spec, family="exaone4", block="normed_branch", head_norm=True)
    if config["sliding_window"] is None:
        llama.sliding_layers(config, spec.num_layers)  # refuses kinds of layers that nobody knows
        return spec
    sliding = sliding_layers(config, spec.num_layers)
    return replace(
        spec,
        windows=llama.windows(config, spec.num_layers, sliding),
        layer_ropes=tuple(spec.rope if slides else None for slides in sliding),
    )


_DEFAULTS = {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096}


def sliding_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """From `layer_types`, else from `sliding_window_pattern`: each n-th layer is a full one, or letters that repeat, L
    for a window and G for a full layer, with a full one at the end.
    """
    pattern = config.get("sliding_window_pattern", 4)
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        return llama.sliding_layers(
            config, layers, lambda layer: pattern[layer % len(pattern)] == "L" and layer + 1 < layers
        )
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
        if config.get("layer_types") is None:
            raise CheckpointError(
                "config.json: 'sliding_window_pattern' must be a positive whole number or letters L and G, and it is "
                f"{pattern!r}."
            )
        pattern = 1
    return llama.sliding_layers(config, layers, lambda layer: (layer + 1) % pattern != 0)


FAMILY = Family("exaone4", ("Exaone4ForCausalLM",), read_spec, llama.weights)
