"""What DeepSeek-V2 and V3 share: latent attention, the rotation's part in its scale, which layers have experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mii.errors import CheckpointError
from mii.modeling.config_reader import ACTIVATIONS, ConfigReader
from mii.modeling.families import llama
from mii.modeling.families.base import Target
from mii.modeling.families.expert_names import expert_targets, stacked_targets
from mii.modeling.rope import context_length, read_rope
from mii.modeling.spec import ExpertsSpec, LatentSpec, ModelSpec, RopeSpec

_NORM_EPS = 1e-6  # of the latents' norms, whatever the config says about the others


def read_spec(config: Mapping[str, Any], read: ConfigReader) -> ModelSpec:
    """All but the experts."""
    latent, heads = _latent(config, read), read.required_integer("num_attention_heads")
    if read.integer("num_key_value_heads", heads) != heads:
        raise CheckpointError(
            f"config.json: 'num_key_value_heads' is {config['num_key_value_heads']!r}; with latent attention every one "
            f"of the {heads} attention heads has a key head."
        )
    rope, layers = _rope(config, latent), read.required_integer("num_hidden_layers")
    return ModelSpec(
        family="deepseek",
        vocab_size=read.required_integer("vocab_size"),
        hidden_size=read.required_integer("hidden_size"),
        num_layers=layers,
        q_heads=heads,
        kv_heads=heads,
        head_dim=latent.head_size,
        intermediate_size=read.required_integer("intermediate_size"),
        max_positions=context_length(rope, read.integer("max_position_embeddings", 2048)),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        activation=read.choice("hidden_act", ACTIVATIONS, "silu"),
        rope=rope,
        windows=(0,) * layers,
        attention_scale=latent.head_size**-0.5 * _growth(rope) ** 2,
        output_bias=latent.bias,
        tied_embeddings=read.flag("tie_word_embeddings"),
        latent=latent,
    )


def _latent(config: Mapping[str, Any], read: ConfigReader) -> LatentSpec:
    no_rank = "q_lora_rank" in config and config["q_lora_rank"] is None
    latent = LatentSpec(
        kv_rank=read.integer("kv_lora_rank", 512),
        q_rank=0 if no_rank else read.integer("q_lora_rank", 1536),
        rope_size=read.integer("qk_rope_head_dim", 64),
        plain_size=read.integer("qk_nope_head_dim", 128),
        value_size=read.integer("v_head_dim", 128),
        norm_eps=_NORM_EPS,
        bias=read.flag("attention_bias"),
    )
    if latent.value_size > latent.head_size:
        raise CheckpointError(
            f"config.json: 'v_head_dim' is {latent.value_size}; it may be {latent.head_size} at most here, "
            "'qk_nope_head_dim' and 'qk_rope_head_dim' together."
        )
    return latent


def _rope(config: Mapping[str, Any], latent: LatentSpec) -> RopeSpec:
    rope = read_rope(config, latent.rope_size)
    if rope.rotary_dim != latent.rope_size:
        raise CheckpointError(
            f"config.json: 'partial_rotary_factor' must be 1 or left out, since all {latent.rope_size} elements of "
            "'qk_rope_head_dim' are rotated."
        )
    return replace(rope, interleaved=True)


def _growth(rope: RopeSpec) -> float:
    """What a scaled rotation multiplies queries and keys with besides the factor in its table."""
    if rope.kind == "default" or not rope.scaling.get("mscale_all_dim"):
        return 1.0
    read = ConfigReader(rope.scaling)
    weight, factor = read.number("mscale_all_dim", 0.0), read.number("factor", 1.0)
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def read_experts(
    config: Mapping[str, Any], read: ConfigReader, layers: int, defaults: Mapping[str, int]
) -> ExpertsSpec | None:
    """The experts of a config, without groups; None where no layer has any.

    Args:
        defaults: What the family takes for fields that the config leaves out.
    """
    first, step = (
        read.count("first_k_dense_replace", defaults["first_k_dense_replace"]),
        read.integer("moe_layer_freq", 1),
    )
    sparse = tuple(layer >= first and layer % step == 0 for layer in range(layers))
    count, shared = (
        0 if name in config and config[name] is None else read.count(name, defaults[name])
        for name in ("n_routed_experts", "n_shared_experts")
    )
    if count == 0 or not any(sparse):
        return None
    width = read.integer("moe_intermediate_size", defaults["moe_intermediate_size"])
    return read.experts(
        ExpertsSpec(
            count=count,
            top_k=read.integer("num_experts_per_tok", defaults["num_experts_per_tok"]),
            intermediate_size=width,
            layers=sparse,
            renormalise=False,
            scale=read.number("routed_scaling_factor", 1.0),
            shared_size=shared * width,
            shared_gate=False,
        )
    )


def in_groups(experts: ExpertsSpec, read: ConfigReader, groups: int, best: int) -> ExpertsSpec:
    """The experts with the groups that a token's choice is limited to; the numbers are the family's defaults."""
    groups, best = read.integer("n_group", groups), read.integer("topk_group", best)
    if experts.count % groups or best > groups or experts.top_k > experts.count // groups * best:
        raise CheckpointError(
            f"config.json: {best} ('topk_group') of {groups} groups ('n_group') of {experts.count} experts do not give "
            f"a token {experts.top_k} to choose from ('num_experts_per_tok')."
        )
    return replace(experts, groups=groups, top_groups=best)


def weights(spec: ModelSpec) -> dict[str, Target]:
    return _dense(spec) | (expert_targets(spec, shared=_SHARED) if spec.experts else {})


def stacked(spec: ModelSpec) -> dict[str, Target]:
    return _dense(spec) | (stacked_targets(spec, shared=_SHARED) if spec.experts else {})


def apart(spec: ModelSpec) -> dict[str, Target]:
    targets = weights(spec)
    for layer in range(spec.num_layers):
        source = f"model.layers.{layer}.self_attn"
        path, *_ = targets.pop(f"{source}.kv_b_proj.weight")
        targets |= {f"{source}.{part}_b_proj.weight": Target(path, part) for part in "kv"}
    return targets


def _dense(spec: ModelSpec) -> dict[str, Target]:
    assert spec.latent is not None
    targets, latent = llama.weights(spec, _ATTENTION), spec.latent
    rows = _query_rows(spec.q_heads, latent)
    for layer in range(spec.num_layers):
        source, target = f"model.layers.{layer}.self_attn", f"blocks.{layer}.attention.qkv"
        queries = "q_b_proj" if latent.q_rank else "q_proj"
        targets[f"{source}.{queries}.weight"] = Target(f"{target}.queries.weight", rows=rows)
        targets[f"{source}.kv_b_proj.weight"] = Target(f"{target}.keys_values.weight")
        downs = {"kv": "kv_a_proj_with_mqa"} | ({"q": "q_a_proj"} if latent.q_rank else {})
        for part, name in downs.items():
            targets[f"{source}.{part}_a_layernorm.weight"] = Target(f"{target}.{part}_norm.weight")
            for kind in ("weight", "bias") if latent.bias else ("weight",):
                targets[f"{source}.{name}.{kind}"] = Target(f"{target}.down.{kind}", part)
    return targets


def _query_rows(heads: int, latent: LatentSpec) -> torch.Tensor:
    """The stored row of each of the queries' rows: checkpoints have the rotated elements of a head last."""
    stored = torch.arange(heads * latent.head_size).view(heads, latent.head_size)
    return stored.roll(latent.rope_size, dims=1).flatten()


_ATTENTION = llama.ATTENTION[-1:]  # the output
_SHARED = "shared_experts"
