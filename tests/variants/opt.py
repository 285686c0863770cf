"""OPT's options; those of opt-350m are post-norm and projected embeddings."""

from __future__ import annotations

from tests.variants import variants

SHAPE = {"ffn_dim": 344, "init_std": 0.12}
VARIANTS = variants(
    "OPT",
    "opt",
    {
        "pre-norm": SHAPE,
        "post-norm": {**SHAPE, "do_layer_norm_before": False},
        "projected embeddings": {**SHAPE, "word_embed_proj_dim": 96},
        "post-norm and projected embeddings": {**SHAPE, "do_layer_norm_before": False, "word_embed_proj_dim": 96},
        "no final norm": {**SHAPE, "_remove_final_layer_norm": True},
        "no biases": {**SHAPE, "enable_bias": False},
        "norms without weights": {**SHAPE, "layer_norm_elementwise_affine": False},
        "gelu and untied": {**SHAPE, "activation_function": "gelu", "tie_word_embeddings": False},
        "heads of 48": {**SHAPE, "num_attention_heads": 4},
    },
)
