"""One module a model family: what its config means, and where its weights go. `FAMILIES` lists them by architecture."""

from __future__ import annotations

from mii.modeling.families import (
    bloom,
    exaone4,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mistral,
    mixtral,
    olmo2,
    opt,
    phi,
    phi3,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from mii.modeling.families.base import Family, Target

_MODULES = (
    bloom,
    exaone4,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mistral,
    mixtral,
    olmo2,
    opt,
    phi,
    phi3,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
FAMILIES: dict[str, Family] = {
    architecture: module.FAMILY for module in _MODULES for architecture in module.FAMILY.architectures
}

__all__ = ["FAMILIES", "Family", "Target"]
