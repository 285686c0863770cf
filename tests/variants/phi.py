"""The options of Phi-1, Phi-1.5 and Phi-2."""

from __future__ import annotations

from tests.variants import variants


def rope(share: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}}


VARIANTS = variants(
    "Phi-2",
    "phi",
    {
        "two fifths rotated, heads of 80": {"hidden_size": 160, "num_attention_heads": 2, **rope(0.4)},
        "grouped heads": {"num_key_value_heads": 1, **rope(0.5)},
        "LayerNorms of queries and keys": {"qk_layernorm": True, "num_key_value_heads": 1, **rope(0.5)},
        "tied, relu": {"tie_word_embeddings": True, "hidden_act": "relu", "num_key_value_heads": None, **rope(0.5)},
    },
)
