"""Mistral with and without its window."""

from __future__ import annotations

from tests.variants import variants

VARIANTS = variants(
    "Mistral",
    "mistral",
    {
        "no window": {"sliding_window": None},
        "window": {"sliding_window": 20},
        "heads of 128 of a narrower model (Nemo)": {"sliding_window": None, "head_dim": 128},
    },
)
