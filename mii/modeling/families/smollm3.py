"""SmolLM3: Llama's wiring with layers that do not rotate, which are those with a window where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mii.errors import CheckpointError
from mii.modeling.config_reader import ConfigReader
from mii.modeling.families import llama
from mii.modeling.families.base import Family
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    defaults = {"num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 32768}
    theta = {"rope_theta": config.get("rope_theta") or 2e6}
    spec = llama.read_spec({**defaults, **config, **theta})
    layers, rotated = spec.num_layers, rotated_layers(config, spec.num_layers)
    window, sliding = (0,) * layers, llama.sliding_layers(config, layers, lambda layer: not rotated[layer])
    if ConfigReader(config).flag("use_sliding_window"):
        window = llama.windows(config, layers, sliding)
    return replace(
        spec,
        family="smollm3",
        windows=window,
        layer_ropes=tuple(spec.rope if rotates else None for rotates in rotated),
    )


def rotated_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers rotate: those with a 1 in `no_rope_layers`, else all but each `no_rope_layer_interval`-th."""
    given = config.get("no_rope_layers")
    if given is None:
        interval = ConfigReader(config).integer("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(given, list) or len(given) < layers or not set(given) <= {0, 1}:
        raise CheckpointError(
            f"config.json: 'no_rope_layers' must have a 1 (rotated) or 0 for each of the {layers} layers, and it is "
            f"{given!r}."
        )
    return tuple(bool(each) for each in given[:layers])


FAMILY = Family("smollm3", ("SmolLM3ForCausalLM",), read_spec, llama.weights)
