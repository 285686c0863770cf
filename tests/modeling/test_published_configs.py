"""Configs of published models are read as they are meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mii.modeling.families import FAMILIES
from mii.modeling.rope import rope_table, switch_length
from mii.modeling.spec import ExpertsSpec, LatentSpec, ModelSpec


def read(config: Mapping[str, Any]) -> ModelSpec:
    return FAMILIES[config["architectures"][0]].read_spec(config)


def sizes(layers: int, hidden: int, up: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": up,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


YI_34B = {
    "architectures": ["LlamaForCausalLM"],
    **sizes(60, 7168, 20480, 56, 8, 64000),
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
VICUNA_16K = {
    "architectures": ["LlamaForCausalLM"],
    **sizes(32, 4096, 11008, 32, 32, 32000),
    "max_position_embeddings": 4096,
    "max_sequence_length": 16384,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
NEMO = {
    "architectures": ["MistralForCausalLM"],
    **sizes(40, 5120, 14336, 32, 8, 131072),
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    **sizes(28, 3584, 18944, 28, 4, 152064),
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    **sizes(36, 2560, 9728, 32, 8, 151936),
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
PHI3_128K = {
    "architectures": ["Phi3ForCausalLM"],
    **sizes(32, 3072, 8192, 32, 32, 32064),
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "sliding_window": 262144,
    "attention_bias": False,
}
PHI4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    **sizes(32, 3072, 8192, 24, 8, 200064),
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"],
    **sizes(18, 2048, 16384, 8, 1, 256000),
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "max_position_embeddings": 8192,
}
GEMMA2_27B = {
    "architectures": ["Gemma2ForCausalLM"],
    **sizes(46, 4608, 36864, 32, 16, 256000),
    "head_dim": 128,
    "query_pre_attn_scalar": 144,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA3_4B = {  # as it is: whatever is the default of the library's class is left out
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
OLMO2_7B = {
    "architectures": ["Olmo2ForCausalLM"],
    **sizes(32, 4096, 11008, 32, 32, 100352),
    "max_position_embeddings": 4096,
    "rope_theta": 500000,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
}
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"],
    **sizes(36, 2048, 11008, 16, 4, 128256),
    "max_position_embeddings": 65536,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "no_rope_layer_interval": 4,
    "rope_theta": 5000000.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": ["full_attention"] * 36,
}
EXAONE4_32B = {
    "architectures": ["Exaone4ForCausalLM"],
    **sizes(64, 5120, 27392, 40, 8, 102400),
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
}
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    **sizes(27, 2048, 10944, 16, 16, 102400),
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
}
DEEPSEEK_V2 = {
    **DEEPSEEK_V2_LITE,
    **sizes(60, 5120, 12288, 128, 128, 102400),
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    **sizes(27, 2048, 11264, 16, 16, 163840),
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
}
QWEN_7B = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 151936,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (YI_34B, {"head_dim": 128, "q_heads": 56, "kv_heads": 8, "max_positions": 4096, "norm_eps": 1e-5}),
        (VICUNA_16K, {"head_dim": 128, "max_positions": 16384}),
        (NEMO, {"head_dim": 128, "q_size": 4096, "max_positions": 131072, "windows": (0,) * 40}),
        (QWEN25_7B, {"qkv_bias": True, "output_bias": False, "windows": (0,) * 28, "norm_eps": 1e-6}),
        (QWEN3_4B, {"qkv_bias": False, "head_norm": True, "tied_embeddings": True, "q_size": 4096}),
        (PHI3_128K, {"head_dim": 96, "max_positions": 131072, "windows": (262144,) * 32, "norm_eps": 1e-5}),
        (PHI4_MINI, {"head_dim": 128, "kv_heads": 8, "tied_embeddings": True}),
        (GEMMA_2B, {"activation": "gelu_tanh", "norm": "rms_plus1", "tied_embeddings": True, "block": "sequential"}),
        (
            GEMMA2_27B,
            {"attention_scale": 1 / 12, "attention_softcap": 50.0, "logit_softcap": 30.0, "windows": (4096, 0) * 23},
        ),
        (
            GEMMA3_4B,
            {"q_heads": 8, "kv_heads": 4, "head_dim": 256, "vocab_size": 262208, "max_positions": 131072,
             "attention_scale": 1 / 16, "logit_softcap": 0.0, "tied_embeddings": True, "embedding_scale": 2560**0.5},
        ),
        (OLMO2_7B, {"row_norm": True, "block": "normed_branch", "norm_eps": 1e-6, "tied_embeddings": False}),
        (SMOLLM3_3B, {"windows": (0,) * 36, "tied_embeddings": True, "max_positions": 65536}),
        (EXAONE4_32B, {"windows": (4096, 4096, 4096, 0) * 16, "head_norm": True, "norm_eps": 1e-5}),
        (
            DEEPSEEK_V2_LITE,
            {"head_dim": 192, "kv_heads": 16, "max_positions": 163840, "attention_scale": 0.114721386,
             "tied_embeddings": False, "norm_eps": 1e-6, "mlp_bias": False, "output_bias": False},
        ),
        (DEEPSEEK_V2, {"head_dim": 192, "q_heads": 128, "attention_scale": 0.114721386}),
        (MOONLIGHT, {"head_dim": 192, "max_positions": 8192, "attention_scale": 192**-0.5, "norm_eps": 1e-5}),
        (QWEN_7B, {"intermediate_size": 11008, "max_positions": 32768, "log_length": 8192, "mlp_bias": False}),
    ],
    ids=lambda value: value["architectures"][0] if "architectures" in value else "",
)  # fmt: skip
def test_a_published_config_is_read_as_it_is_meant(config: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = read(config)
    for name, value in expected.items():
        assert getattr(spec, name) == (pytest.approx(value) if isinstance(value, float) else value), name


def test_rotations_of_published_models() -> None:
    for config in (PHI3_128K, PHI4_MINI):
        rope = read(config).rope
        assert rope is not None
        assert (rope.rotary_dim, switch_length(rope)) == (96, 4096)
    full, local = read(GEMMA3_4B).ropes[5], read(GEMMA3_4B).ropes[4]
    assert full is not None
    assert local is not None
    assert (full.theta, full.kind, full.scaling["factor"], local.theta, local.kind) == (
        1e6,
        "linear",
        8.0,
        1e4,
        "default",
    )
    assert [rope is not None for rope in read(SMOLLM3_3B).ropes[:8]] == [True, True, True, False] * 2
    assert [rope is not None for rope in read(EXAONE4_32B).ropes[:8]] == [True, True, True, False] * 2
    assert all(rope is not None for rope in read({**EXAONE4_32B, "sliding_window": None}).ropes)


def test_experts_of_published_models() -> None:
    lite, large, moonlight = (read(config).experts for config in (DEEPSEEK_V2_LITE, DEEPSEEK_V2, MOONLIGHT))
    layers = (False,) + (True,) * 26
    assert lite == ExpertsSpec(
        64, 6, 1408, layers, renormalise=False, shared_size=2816, shared_gate=False
    )  # fmt: skip
    assert large is not None
    assert (large.count, large.groups, large.top_groups, large.scale) == (160, 8, 3, 16.0)
    assert moonlight == ExpertsSpec(
        64, 6, 1408, layers, "sigmoid", scale=2.446, choice_bias=True, shared_size=2816, shared_gate=False
    )
    every_second = read({**DEEPSEEK_V2_LITE, "moe_layer_freq": 2}).experts
    assert every_second is not None
    assert every_second.layers == tuple(layer > 0 and layer % 2 == 0 for layer in range(27))
    assert read({**DEEPSEEK_V2_LITE, "n_routed_experts": None}).experts is None


def test_latents_of_published_models() -> None:
    assert read(DEEPSEEK_V2_LITE).latent == LatentSpec(512, 0, 64, 128, 128, 1e-6)
    assert read(DEEPSEEK_V2).latent == LatentSpec(512, 1536, 64, 128, 128, 1e-6)
    rope = read(DEEPSEEK_V2_LITE).rope
    assert rope is not None
    assert (rope.rotary_dim, rope.interleaved, rope.kind) == (64, True, "yarn")
    assert float(rope_table(rope, 1, torch.device("cpu"))[0, 0]) == 1.0  # both weights of the scale are the same
