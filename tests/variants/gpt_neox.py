"""GPT-NeoX's options."""

from __future__ import annotations

from tests.variants import variants


def rope(share: float, **scaling: object) -> dict[str, object]:
    kind = {"rope_type": "default", "rope_theta": 10000.0}
    return {"rope_parameters": {**kind, "partial_rotary_factor": share, **scaling}}


VARIANTS = variants(
    "GPT-NeoX",
    "gpt_neox",
    {
        "parallel, a quarter rotated": rope(0.25),
        "sequential, wholly rotated": {"use_parallel_residual": False, **rope(1.0)},
        "no attention biases, tied": {"attention_bias": False, "tie_word_embeddings": True, **rope(0.5)},
        "other theta, gelu_new": {"hidden_act": "gelu_new", **rope(0.25, rope_theta=500.0)},
        "linear rope, heads of 96": {"num_attention_heads": 2, **rope(0.25, rope_type="linear", factor=4.0)},
    },
)
