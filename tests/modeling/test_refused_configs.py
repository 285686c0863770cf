"""Values in configs of published models that cannot be served are refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mii.errors import CheckpointError
from tests.modeling.test_published_configs import (
    DEEPSEEK_V2,
    DEEPSEEK_V2_LITE,
    EXAONE4_32B,
    GEMMA2_27B,
    GEMMA3_4B,
    GEMMA_2B,
    MOONLIGHT,
    OLMO2_7B,
    PHI3_128K,
    QWEN25_7B,
    QWEN_7B,
    SMOLLM3_3B,
    read,
)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            DEEPSEEK_V2_LITE,
            {"num_key_value_heads": 4},
            "'num_key_value_heads' is 4; with latent attention every one of",
        ),
        (DEEPSEEK_V2_LITE, {"v_head_dim": 200}, "'v_head_dim' is 200; it may be 192 at most"),
        (DEEPSEEK_V2_LITE, {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' must be 1 or left out"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "'norm_topk_prob' must be false for DeepSeek-V2"),
        (DEEPSEEK_V2_LITE, {"scoring_func": "sigmoid"}, "'scoring_func' is 'sigmoid'; supported are softmax"),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, "'topk_method' is 'noaux_tc'; supported are greedy, group_l"),
        (DEEPSEEK_V2_LITE, {"num_experts_per_tok": 65}, "a token cannot go to 65 experts"),
        (DEEPSEEK_V2_LITE, {"kv_lora_rank": "512"}, "'kv_lora_rank' must be a positive whole number"),
        (
            DEEPSEEK_V2_LITE,
            {"first_k_dense_replace": -1},
            "'first_k_dense_replace' must be a whole number of at least 0",
        ),
        (
            DEEPSEEK_V2_LITE,
            {"rope_scaling": {**DEEPSEEK_V2_LITE["rope_scaling"], "mscale_all_dim": "1"}},
            "rope type 'yarn' needs 'mscale_all_dim' above 0, and it is '1'",
        ),
        (DEEPSEEK_V2, {"n_group": 7}, "3 ('topk_group') of 7 groups ('n_group') of 160 experts"),
        (DEEPSEEK_V2, {"topk_group": 9}, "9 ('topk_group') of 8 groups"),
        (DEEPSEEK_V2, {"n_group": 160}, "do not give a token 6 to choose from"),
        (MOONLIGHT, {"rope_interleave": 1}, "'rope_interleave' must be true or false"),
        (QWEN25_7B, {"use_sliding_window": "no"}, "'use_sliding_window' must be true or false"),
        (QWEN25_7B, {"use_sliding_window": True, "sliding_window": 0}, "'sliding_window' must be null or a positive"),
        (
            QWEN25_7B,
            {"use_sliding_window": True, "layer_types": ["full_attention", "linear_attention"] * 14},
            "'layer_types' must name one of 'sliding_attention' and 'full_attention' for each of the 28 layers",
        ),
        (QWEN25_7B, {"use_sliding_window": True, "layer_types": ["full_attention"]}, "for each of the 28 layers"),
        (QWEN25_7B, {"layer_types": ["linear_attention"] * 28}, "'layer_types' must name one of"),
        (SMOLLM3_3B, {"layer_types": ["chunked_attention"] * 36}, "'layer_types' must name one of"),
        (EXAONE4_32B, {"sliding_window": None, "layer_types": ["x"] * 64}, "'layer_types' must name one of"),
        (PHI3_128K, {"rope_scaling": {**PHI3_128K["rope_scaling"], "long_factor": [1.0]}}, "'long_factor' with 48"),
        (PHI3_128K, {"hidden_act": "tanh"}, "'hidden_act' is 'tanh'; supported are"),
        (GEMMA_2B, {"use_bidirectional_attention": True}, "only causal models can generate"),
        (GEMMA2_27B, {"attn_logit_softcapping": -1}, "'attn_logit_softcapping' must be a number above 0"),
        (GEMMA2_27B, {"query_pre_attn_scalar": "x"}, "'query_pre_attn_scalar' must be a number above 0"),
        (
            GEMMA3_4B,
            {"text_config": {**GEMMA3_4B["text_config"], "attn_logit_softcapping": 50.0}},
            "'attn_logit_softcapping' must be null",
        ),
        (
            GEMMA3_4B,
            {"text_config": {**GEMMA3_4B["text_config"], "rope_scaling": {"rope_type": "cubic"}}},
            "rope type 'cubic' is not known",
        ),
        (OLMO2_7B, {"clip_qkv": 8.0}, "'clip_qkv' must be null for OLMo-2, and it is 8.0"),
        (SMOLLM3_3B, {"no_rope_layers": [1, 0]}, "'no_rope_layers' must have a 1 (rotated) or 0 for each of the 36"),
        (SMOLLM3_3B, {"no_rope_layers": [2] * 36}, "'no_rope_layers' must have a 1"),
        (EXAONE4_32B, {"sliding_window_pattern": "LLX"}, "must be a positive whole number or letters L and G"),
        (QWEN_7B, {"intermediate_size": 7}, "'intermediate_size' counts gate and up, so 7 must be even"),
        (QWEN_7B, {"scale_attn_weights": False}, "'scale_attn_weights' is false"),
    ],
)
def test_a_value_that_cannot_be_served_is_refused_by_name(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read({**config, **change})
