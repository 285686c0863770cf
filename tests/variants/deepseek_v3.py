"""DeepSeek-V3: sigmoid scores, biases of the choice, groups by their two best experts."""

from __future__ import annotations

from tests.variants import variants
from tests.variants.deepseek_v2 import SIZES, YARN

GROUPS = {**SIZES, "n_group": 4, "topk_group": 2}
VARIANTS = variants(
    "DeepSeek-V3",
    "deepseek_v3",
    {
        "groups, YaRN": {
            **GROUPS,
            "q_lora_rank": 56,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        "one group, not renormalised": {
            **SIZES,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,  # a larger one makes 16-bit rounding in the experts as much larger
        },
        "halves rotated, biases": {**GROUPS, "rope_interleave": False, "attention_bias": True},
        "stacked experts": {**GROUPS, "stacked": True},
    },
    in_16_bits={"plain_routing": True},
)
