"""EXAONE-4: the small model's full layers, and the large one's rotated windows among full layers that do not
rotate.
"""

from __future__ import annotations

from tests.variants import variants

VARIANTS = variants(
    "EXAONE-4",
    "exaone4",
    {
        "full layers": {"sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
        "three windows to a full layer": {"num_hidden_layers": 5, "sliding_window": 20, "sliding_window_pattern": 4},
        "windows by layer types, Llama 3 rope": {
            "num_hidden_layers": 3,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    },
)
