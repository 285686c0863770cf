"""Bloom's options; ALiBi's slopes follow another rule where the head count is no power of two.

In 16 bits transformers rounds the scores with ALiBi in them, which costs up to 8 units in the last place of the logits;
so ours are compared with its logits in float32.
"""

from __future__ import annotations

from tests.variants import variants

VARIANTS = variants(
    "Bloom",
    "bloom",
    {
        "3 heads": {},
        "4 heads": {"num_attention_heads": 4},
        "12 heads": {"num_attention_heads": 12},
        "untied": {"tie_word_embeddings": False},
        "normed residual": {"apply_residual_connection_post_layernorm": True},
        "large epsilon": {"layer_norm_epsilon": 0.1},
    },
    exact_dtype="fp32",
)
