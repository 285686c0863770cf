"""Hugging Face configs out of a GGUF file's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mii.errors import CheckpointError, UnsupportedModelError
from mii.modeling.checkpoint.gguf.architectures import Architecture
from mii.modeling.checkpoint.gguf.deepseek import DEEPSEEK, deepseek_fields
from mii.modeling.checkpoint.gguf.metadata import Metadata
from mii.modeling.checkpoint.gguf.reader import GGUFTensor

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that end a text or a turn. Many files name only one of theirs in the keys above.
_END_NAMES = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|eot|>",
        "<|return|>",
        "<|endofturn|>",
        "[|endofturn|]",
        "<EOT>",
    }
)
_CONTROL = 3
# Llama 3.1 to 3.3: GGUF stores the resulting divisors, and only `factor` differs between the models.
_LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def build_config(architecture: Architecture, metadata: Metadata) -> dict[str, Any]:
    """The config.json that a model of this file would have, in the form of `transformers`."""
    heads = metadata.integer("attention.head_count")
    hidden = metadata.integer("embedding_length")
    if heads == 0:
        raise CheckpointError(f"{metadata.path}: the model has no attention heads.")
    latent = architecture.model_type in DEEPSEEK  # whose config calls the rotated part of a head so
    head_dim = metadata.integer("rope.dimension_count" if latent else "attention.key_length", hidden // heads)
    config = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "vocab_size": metadata.rows("token_embd.weight"),
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer("context_length"),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in metadata.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in metadata.tensors,
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
        "torch_dtype": _dtype(metadata.tensors),
        "bos_token_id": metadata.token_id("bos_token_id"),
        "eos_token_id": metadata.token_id("eos_token_id"),
        "pad_token_id": metadata.token_id("padding_token_id"),
    }
    config["dtype"] = config["torch_dtype"]
    if metadata.get("attention.layer_norm_rms_epsilon") is not None:
        config["rms_norm_eps"] = metadata.number("attention.layer_norm_rms_epsilon")
    if metadata.get("attention.sliding_window"):
        config["sliding_window"] = metadata.integer("attention.sliding_window")
    if architecture.model_type not in ("bloom", "gpt2", "gptj"):  # without rotation, or with settings of its own
        config |= _rope(metadata, head_dim)
    config |= _specific(architecture, metadata, config)
    if architecture.model_type == "falcon":
        del config["head_dim"]  # Falcon's config derives it and takes no other
    return config


def build_generation_config(metadata: Metadata) -> dict[str, Any]:
    """Every end-of-text id of the file: end of text, of turn, of message, and control tokens that are known as such."""
    ends = [token for key in _END_KEYS if (token := metadata.token_id(key)) is not None]
    unknown = metadata.token_id("unknown_token_id")  # SmolLM2 gives <|endoftext|> this role instead
    tokens, kinds = metadata.values.get("tokenizer.ggml.tokens"), metadata.values.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, np.ndarray) and len(tokens) == len(kinds):
        known = [int(token) for token in np.flatnonzero(kinds == _CONTROL) if tokens[token] in _END_NAMES]
        ends += [token for token in known if token != unknown]
    ends = list(dict.fromkeys(ends))
    config: dict[str, Any] = {}
    for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        if metadata.token_id(key) is not None:
            config[name] = metadata.token_id(key)
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return config


def _dtype(tensors: Mapping[str, GGUFTensor]) -> str:
    """What the matrices were before quantisation, as far as the file shows it."""
    matrices = {tensor.type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    if matrices <= {"F32"}:
        return "float32"
    return "float16" if matrices <= {"F32", "F16"} else "bfloat16"


def _rope(metadata: Metadata, head_dim: int) -> dict[str, Any]:
    """Rotary settings in both forms: `rope_theta` with `rope_scaling`, and `rope_parameters`."""
    rotary_dim = metadata.integer("rope.dimension_count", head_dim)
    theta = metadata.number("rope.freq_base", 10000.0)
    scaling = _rope_scaling(metadata, rotary_dim, theta)
    fields: dict[str, Any] = {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }
    if rotary_dim != head_dim:
        fields["partial_rotary_factor"] = fields["rope_parameters"]["partial_rotary_factor"] = rotary_dim / head_dim
    if scaling and "original_max_position_embeddings" in scaling:
        fields["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return fields


def _rope_scaling(metadata: Metadata, rotary_dim: int, theta: float) -> dict[str, Any] | None:
    if "rope_freqs.weight" in metadata.tensors:
        return _frequency_factors(metadata, rotary_dim, theta)
    if "rope_factors_long.weight" in metadata.tensors:
        return _long_rope(metadata)
    kind = metadata.get("rope.scaling.type")
    if kind is None and metadata.get("rope.scale_linear") is not None:  # files from before the type had a key
        return {"rope_type": "linear", "factor": metadata.number("rope.scale_linear")}
    if kind in (None, "none") or metadata.number("rope.scaling.factor", 1.0) == 0:
        return None
    factor = metadata.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModelError(f"{metadata.path}: rope scaling {kind!r} is not supported; linear and yarn are.")
    original = metadata.integer("rope.scaling.original_context_length", metadata.integer("context_length"))
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if metadata.get(f"rope.scaling.{key}") is not None:
            scaling[name] = metadata.number(f"rope.scaling.{key}")
    if metadata.get("rope.scaling.attn_factor") is not None:
        scaling["attention_factor"] = metadata.number("rope.scaling.attn_factor") * (0.1 * math.log(factor) + 1.0)
    return scaling


def _factors(metadata: Metadata, name: str) -> torch.Tensor:
    tensor = metadata.tensors[name]
    if tensor.type.dtype is None or not tensor.type.dtype.is_floating_point:
        raise CheckpointError(f"{metadata.path}: tensor {name} is stored as {tensor.type.name} instead of F32.")
    return tensor.file.tensor(tensor.start, tensor.type.dtype, tensor.shape).double().flatten()


def _frequency_factors(metadata: Metadata, rotary_dim: int, theta: float) -> dict[str, Any] | None:
    """The settings behind stored divisors of the rotary frequencies: Llama 3's where those give the same divisors."""
    factors = _factors(metadata, "rope_freqs.weight")
    if (factors == 1).all():
        return None
    largest = round(float(factors.max()), 4)
    expected = _llama3_divisors(rotary_dim, theta, largest)
    if len(factors) == len(expected) and torch.allclose(factors, expected, rtol=1e-3):
        return {"rope_type": "llama3", "factor": largest, **_LLAMA3}
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": metadata.integer("context_length"),
    }


def _llama3_divisors(rotary_dim: int, theta: float, factor: float) -> torch.Tensor:
    """What Llama 3 divides each frequency by: 1 where it turns often, `factor` where rarely, blended between."""
    frequencies = theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / (keep + (1 - keep) / factor)


def _long_rope(metadata: Metadata) -> dict[str, Any]:
    scaling = {
        "rope_type": "longrope",
        "short_factor": _factors(metadata, "rope_factors_short.weight").tolist(),
        "long_factor": _factors(metadata, "rope_factors_long.weight").tolist(),
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length"),
    }
    if metadata.get("rope.scaling.attn_factor") is not None:
        scaling["attention_factor"] = metadata.number("rope.scaling.attn_factor")
    return scaling


def _specific(architecture: Architecture, metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that only some architectures have."""
    kind = architecture.model_type
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return _experts(kind, metadata)
    if kind in DEEPSEEK:
        return deepseek_fields(metadata, config)
    if kind in ("gemma", "gemma2", "gemma3_text"):
        return _gemma(kind, metadata, config)
    if kind == "exaone4":
        if "sliding_window" in config:
            return _sliding_layers(metadata)
        return {"sliding_window": None, "layer_types": ["full_attention"] * config["num_hidden_layers"]}
    if kind == "qwen":
        return _qwen(config)
    if kind == "falcon":
        return _falcon(metadata, config)
    if kind in ("bloom", "gpt2", "gptj", "gpt_neox"):
        return _gpt(kind, metadata, config)
    if kind == "phi":
        return {"hidden_act": "gelu_new", "layer_norm_eps": metadata.number("attention.layer_norm_epsilon")}
    return {}


def _gpt(kind: str, metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the models that norm by LayerNorm; GGUF does not say which GELU they have."""
    eps = metadata.number("attention.layer_norm_epsilon")
    if kind == "bloom":
        return {"layer_norm_epsilon": eps, "seq_length": config["max_position_embeddings"]}
    if kind == "gpt_neox":
        return {
            "layer_norm_eps": eps,
            "hidden_act": "gelu",
            "attention_bias": "blk.0.attn_qkv.bias" in metadata.tensors,
            "use_parallel_residual": metadata.get("use_parallel_residual") is not False,
        }
    fields: dict[str, Any] = {"layer_norm_epsilon": eps, "activation_function": "gelu_new"}
    fields["n_inner"] = config["intermediate_size"]
    if kind == "gptj":
        fields["rotary_dim"] = metadata.integer("rope.dimension_count")
    return fields


def _experts(kind: str, metadata: Metadata) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_experts_per_tok": metadata.integer("expert_used_count")}
    if kind == "mixtral":
        return fields | {"num_local_experts": metadata.integer("expert_count")}
    widths = {"moe_intermediate_size": "expert_feed_forward_length"}
    widths["shared_expert_intermediate_size"] = "expert_shared_feed_forward_length"
    stored = {name: metadata.integer(key) for name, key in widths.items() if metadata.get(key) is not None}
    # The files do not say whether a token's weights add up to one; those of Qwen3's models do, those of Qwen2's do not.
    return fields | stored | {"num_experts": metadata.integer("expert_count"), "norm_topk_prob": kind == "qwen3_moe"}


def _qwen(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kv_channels": config["head_dim"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "rotary_emb_base": config["rope_theta"],
        "rotary_pct": config.get("partial_rotary_factor", 1.0),
        "seq_length": config["max_position_embeddings"],
    }


def _sliding_layers(metadata: Metadata) -> dict[str, Any]:
    """Which layers have the window: a flag for each of them, or the number of which each is a full one."""
    pattern = metadata.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern.tolist()]}
    return {} if pattern is None else {"sliding_window_pattern": metadata.integer("attention.sliding_window_pattern")}


def _gemma(kind: str, metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    if kind == "gemma":
        return fields
    # The scale of the queries is no key of the format: only the 27B models' differs from their head size.
    is_27b = metadata.integer("block_count") == (46 if kind == "gemma2" else 62)
    heads, hidden = metadata.integer("attention.head_count"), metadata.integer("embedding_length")
    fields["query_pre_attn_scalar"] = hidden // heads if is_27b else config["head_dim"]
    if kind == "gemma2":
        fields["attn_logit_softcapping"] = metadata.number("attn_logit_softcapping", 50.0)
        fields["final_logit_softcapping"] = metadata.number("final_logit_softcapping", 30.0)
        return fields
    if metadata.get("final_logit_softcapping") is not None:
        fields["final_logit_softcapping"] = metadata.number("final_logit_softcapping")
    local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 10000.0)}
    full = {"rope_type": "default", **(config["rope_scaling"] or {}), "rope_theta": config["rope_theta"]}
    rotations = {"full_attention": full, "sliding_attention": local}
    return fields | {"rope_parameters": rotations, "rope_scaling": None} | _sliding_layers(metadata)


def _falcon(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    heads_kv = config["num_key_value_heads"]
    two_norms = "blk.0.attn_norm_2.weight" in metadata.tensors
    return {
        "num_kv_heads": heads_kv,
        "multi_query": heads_kv == 1,
        "new_decoder_architecture": two_norms or heads_kv > 1,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "ffn_hidden_size": config["intermediate_size"],
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
    }
