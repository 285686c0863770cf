"""LLaMA, Llama-2, Llama-3 to 3.3, and everything that keeps their wiring (SmolLM, Vicuna, Yi, ...)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mii.errors import CheckpointError
from mii.modeling.config_reader import ACTIVATIONS, ConfigReader
from mii.modeling.families.base import Family, Target
from mii.modeling.rope import context_length, read_rope
from mii.modeling.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Llama's config fields; `attention_bias` biases all four attention projections, `mlp_bias` the MLP."""
    read = ConfigReader(config)
    bias = read.flag("attention_bias")
    spec = rotary_spec("llama", read, norm_eps=read.number("rms_norm_eps", 1e-6), activation="silu")
    return replace(spec, qkv_bias=bias, output_bias=bias, mlp_bias=read.flag("mlp_bias"))


def rotary_spec(
    family: str, read: ConfigReader, *, norm_eps: float, activation: str, rotated: float = 1.0, grouped: bool = True
) -> ModelSpec:
    """What models with rotary positions read alike.

    Args:
        family: As in the spec.
        read: The config.
        norm_eps: As in the spec.
        activation: Where the config names none.
        rotated: Share of a head that is rotated, where the config names none.
        grouped: As in `ConfigReader.heads`.
    """
    sizes = read.sizes(grouped=grouped)
    rope = read_rope({"partial_rotary_factor": rotated, **read.config}, sizes["head_dim"])
    return ModelSpec(
        family=family,
        **sizes,
        intermediate_size=read.required_integer("intermediate_size"),
        max_positions=context_length(rope, read.integer("max_position_embeddings", 2048)),
        norm_eps=norm_eps,
        activation=read.choice("hidden_act", ACTIVATIONS, activation),
        rope=rope,
        tied_embeddings=read.flag("tie_word_embeddings"),
    )


class Projection(NamedTuple):
    """Name of a matrix in a layer of a checkpoint, its path and part in a block, the field of a spec for its bias."""

    name: str
    path: str
    part: str
    biased: str


ATTENTION = (
    Projection("self_attn.q_proj", "attention.qkv", "q", "qkv_bias"),
    Projection("self_attn.k_proj", "attention.qkv", "k", "qkv_bias"),
    Projection("self_attn.v_proj", "attention.qkv", "v", "qkv_bias"),
    Projection("self_attn.o_proj", "attention.output", "", "output_bias"),
)
MLP = (
    Projection("mlp.gate_proj", "mlp.up", "gate", "mlp_bias"),
    Projection("mlp.up_proj", "mlp.up", "up", "mlp_bias"),
    Projection("mlp.down_proj", "mlp.down", "", "mlp_bias"),
)


def weights(spec: ModelSpec, attention: Sequence[Projection] = ATTENTION) -> dict[str, Target]:
    """Where each tensor goes, under the names that the families with Llama's layers share. `spec.block` says where the
    norms are, and what is left out has no name.
    """
    targets = {"model.embed_tokens.weight": Target("embedding.weight"), "model.norm.weight": Target("norm.weight")}
    if not spec.tied_embeddings:
        targets["lm_head.weight"] = Target("head.weight")
    for layer in range(spec.num_layers):
        source, target = f"model.layers.{layer}", f"blocks.{layer}"
        for name, path in _norms(spec, layer).items():
            targets[f"{source}.{name}.weight"] = Target(path)
        has_experts = spec.experts is not None and spec.experts.layers[layer]
        for name, path, part, biased in attention if has_experts else (*attention, *MLP):
            targets[f"{source}.{name}.weight"] = Target(f"{target}.{path}.weight", part)
            if getattr(spec, biased):
                targets[f"{source}.{name}.bias"] = Target(f"{target}.{path}.bias", part)
    return targets


def _norms(spec: ModelSpec, layer: int) -> dict[str, str]:
    """Names of a layer's norms and the paths of their weights. What norms the MLP's output belongs to the norm after
    it: the next layer's first one, or the model's last.
    """
    block, following = f"blocks.{layer}", f"blocks.{layer + 1}.attention_norm"
    found: dict[str, str] = {}
    if spec.head_norm or spec.row_norm:
        found |= {f"self_attn.{each}_norm": f"{block}.attention.{each}_norm.weight" for each in "qk"}
    if spec.block != "normed_branch":
        found["input_layernorm"] = f"{block}.attention_norm.weight"
    if spec.block == "sequential":
        return found | {"post_attention_layernorm": f"{block}.mlp_norm.weight"}
    if spec.block == "sandwich":
        found["pre_feedforward_layernorm"] = f"{block}.mlp_norm.weight"
    found["post_attention_layernorm"] = f"{block}.mlp_norm.branch"
    found["post_feedforward_layernorm"] = f"{following if layer + 1 < spec.num_layers else 'norm'}.branch"
    return found


def windows(config: Mapping[str, Any], layers: int, sliding: tuple[bool, ...] = ()) -> tuple[int, ...]:
    """The sliding window of every layer from `sliding_window`, null being none; of all layers or those in `sliding`."""
    window = config.get("sliding_window")
    if window is None:
        return (0,) * layers
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise CheckpointError(f"config.json: 'sliding_window' must be null or a positive whole number, not {window!r}.")
    return tuple(window if slides else 0 for slides in sliding or (True,) * layers)


def sliding_layers(
    config: Mapping[str, Any], layers: int, by_default: Callable[[int], bool] = lambda layer: False
) -> tuple[bool, ...]:
    """Which layers have the window: from `layer_types`, and where that is missing, `by_default` of a layer's number."""
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(by_default(layer) for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {_SLIDING, _FULL}:
        raise CheckpointError(
            f"config.json: 'layer_types' must name one of '{_SLIDING}' and '{_FULL}' for each of the {layers} layers, "
            f"and it is {kinds!r}."
        )
    return tuple(kind == _SLIDING for kind in kinds)


_SLIDING, _FULL = "sliding_attention", "full_attention"


FAMILY = Family("llama", ("LlamaForCausalLM", "LLaMAForCausalLM"), read_spec, weights)
