"""One module a model family: what its config means, and where its weights go. `FAMILIES` lists them by architecture."""

from __future__ import annotations

from mii.modeling.families import llama, mistral
from mii.modeling.families.base import Family, Target

FAMILIES: dict[str, Family] = {
    architecture: family for family in (llama.FAMILY, mistral.FAMILY) for architecture in family.architectures
}

__all__ = ["FAMILIES", "Family", "Target"]
