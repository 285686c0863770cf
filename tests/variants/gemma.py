"""The three generations of Gemma, with the heads of 256 that all of them have."""

from __future__ import annotations

from tests.variants import variants

HEADS = {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
# The scale of the embeddings and the norms' 1 + weight make the logits large: smaller matrices, as in the others.
SMALL = {"std": 0.05}
# Queries and keys of random norms by 1 + weight are four times as long: a smaller scale keeps several keys in sight.
GEMMA3 = {**SMALL, **HEADS, "num_hidden_layers": 4, "sliding_window": 20, "query_pre_attn_scalar": 2000}
VARIANTS = (
    *variants(
        "Gemma",
        "gemma",
        {
            "heads of 256": {**SMALL, **HEADS},
            "one key head, biases, untied": {
                **SMALL,
                **HEADS,
                "num_key_value_heads": 1,
                "attention_bias": True,
                "tie_word_embeddings": False,
            },
        },
    ),
    *variants(
        "Gemma 2",
        "gemma2",
        {
            "soft caps": {
                **SMALL,
                **HEADS,
                "layer_types": ["full_attention"] * 2,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 5.0,
                "query_pre_attn_scalar": 100,
            },
            "windows in every other layer": {**SMALL, **HEADS, "sliding_window": 20, "num_hidden_layers": 4},
            "no caps": {
                **SMALL,
                "head_dim": 64,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "sliding_window": 512,
            },
        },
    ),
    *variants(
        "Gemma 3",
        "gemma3_text",
        {
            "rotations by layer": {**GEMMA3, "sliding_window_pattern": 2},
            "scaled rotation of full layers, logit cap": {
                **GEMMA3,
                "final_logit_softcapping": 5.0,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                },
            },
        },
    ),
)
