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
        # Sizes that few kernels are made for, each with another one's neighbour.
        "7 heads of 72 to a key head": {"head_dim": 72, "num_attention_heads": 7, "hidden_size": 196},
        "12 heads of 112 to a key head, odd widths": {
            "head_dim": 112,
            "num_attention_heads": 12,
            "intermediate_size": 130,
            "hidden_size": 132,
            "vocab_size": 263,
        },
        "14 heads of 160 to a key head": {
            "head_dim": 160,
            "num_attention_heads": 28,
            "num_key_value_heads": 2,
            "hidden_size": 224,
        },
        "71 heads of 192 to a key head": {"head_dim": 192, "num_attention_heads": 71, "hidden_size": 142},
        "heads of 512": {"head_dim": 512},
        "heads of 520": {"head_dim": 520},
        "heads of 18": {"head_dim": 18, "num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 190},
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
