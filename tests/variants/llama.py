"""Llama's options. What depends on a prompt's length (dynamic scaling) is in tests/modeling/test_llama.py."""

from __future__ import annotations

from tests.variants import variants

THETA = {"rope_theta": 10000.0}
VARIANTS = variants(
    "Llama",
    "llama",
    {
        "heads of 64": {},
        "heads of 80": {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 4},
        "heads of 128": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "tied embeddings": {"tie_word_embeddings": True},
        "gelu": {"hidden_act": "gelu"},
        "large epsilon": {"rms_norm_eps": 0.1},
        "other theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}},
        "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}},
        "YaRN rope": {
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA},
        },
        "Llama 3 rope": {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                **THETA,
            }
        },
    },
)
