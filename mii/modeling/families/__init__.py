"""One module a model family: what its config means, and where its weights go. `FAMILIES` lists them by architecture."""

from __future__ import annotations

from importlib import import_module

from mii.modeling.families.base import Family, Target

_MODULES = (
    "bloom",
    "deepseek_v2",
    "deepseek_v3",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "gptj",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)


def _by_architecture() -> dict[str, Family]:
    families: list[Family] = [import_module(f"{__name__}.{module}").FAMILY for module in _MODULES]
    return {architecture: family for family in families for architecture in family.architectures}


FAMILIES = _by_architecture()

__all__ = ["FAMILIES", "Family", "Target"]
