"""One module a model family: what its config means, and where its weights go. `FAMILIES` lists them by architecture."""

from __future__ import annotations

from mii.modeling.families import bloom, falcon, gpt2, gpt_neox, gptj, llama, mistral, opt, phi
from mii.modeling.families.base import Family, Target

_MODULES = (bloom, falcon, gpt2, gpt_neox, gptj, llama, mistral, opt, phi)
FAMILIES: dict[str, Family] = {
    architecture: module.FAMILY for module in _MODULES for architecture in module.FAMILY.architectures
}

__all__ = ["FAMILIES", "Family", "Target"]
