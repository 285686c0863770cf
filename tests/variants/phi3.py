"""Phi-3 and Phi-4: LongRoPE, windows, partly rotated heads.

The lengths of the shared tests lie on both sides of the trained length here, and answers grow over it.
"""

from __future__ import annotations

import torch

from tests.oracle import Oracle
from tests.variants import variants

TRAINED = 72


class LongRopeOracle(Oracle):
    """Tokens of contexts up to the trained length come from the short factors, those of longer ones from the long."""

    @torch.inference_mode()
    def logits_along(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        short = max(0, min(len(answer), TRAINED + 1 - len(prompt)))
        ids = torch.tensor([(prompt + answer)[: len(prompt) + short - 1]], device=self.device)
        parts = [self.model(ids).logits[0, len(prompt) - 1 :].float().cpu()] if short else []
        if short < len(answer):
            parts.append(super().logits_along(prompt + answer[:short], answer[short:]))
        return torch.cat(parts)


def long_rope(rotated: int, **more: float) -> dict[str, object]:
    return {
        "original_max_position_embeddings": TRAINED,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + index / 50 for index in range(rotated // 2)],
            "long_factor": [1.0 + index / 4 for index in range(rotated // 2)],
            **more,
        },
    }


PHI = {"num_key_value_heads": 3, "pad_token_id": 0}
VARIANTS = (
    *variants(
        "Phi-3",
        "phi3",
        {
            "heads of 96, window": {**PHI, "hidden_size": 288, "sliding_window": 20},
            "groups": {"pad_token_id": 0},
        },
    ),
    *variants(
        "Phi-3",
        "phi3",
        {
            "LongRoPE": {**PHI, **long_rope(64)},
            "LongRoPE with a factor, window": {**PHI, **long_rope(64, factor=16.0), "sliding_window": 90},
            "LongRoPE of partly rotated heads, tied (Phi-4-mini)": {
                **PHI,
                **long_rope(48, partial_rotary_factor=0.75),
                "tie_word_embeddings": True,
            },
        },
        oracle=LongRopeOracle,
    ),
)
