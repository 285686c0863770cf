"""Every variant of every model family that is compared with transformers, on the CPU and on a card.

A module here for each family, named as in `mii/modeling/families/`, with `VARIANTS`: what `variants(...)` returns.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import write_checkpoint
from tests.oracle import Oracle


@dataclass(frozen=True, slots=True)
class Variant:
    """A tiny random checkpoint that turns on an option of a family.

    Args:
        family: The model's name in docs/families.md.
        option: What is turned on, in a few words.
        model_type: As in config.json.
        config: `write_checkpoint`'s arguments.
        write: Writes the checkpoint into an empty folder, as `write_checkpoint` does.
        oracle: Opens a checkpoint as `Oracle` does; another one where transformers has no class for the family.
        exact_dtype: The dtype that the oracle computes in where we compute in 16 bits, if not the same: where
            transformers rounds in between what we keep in float, and is further off than the tolerance allows.
        in_16_bits: More of `config` where numbers have 16 bits: what keeps rounding from deciding between experts.
    """

    family: str
    option: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[..., Path] = write_checkpoint
    oracle: Callable[..., Oracle] = Oracle
    exact_dtype: str = ""
    in_16_bits: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.family}-{self.option}".replace(" ", "_")

    def make(self, folder: Path, dtype: str = "fp32") -> Path:
        more = {} if dtype == "fp32" else self.in_16_bits
        return self.write(folder, self.model_type, **self.config, **more)


def variants(
    family: str, model_type: str, options: Mapping[str, Mapping[str, Any]], **settings: Any
) -> tuple[Variant, ...]:
    """A variant for each option of one family; `settings` are those of `Variant`."""
    return tuple(Variant(family, option, model_type, config, **settings) for option, config in options.items())


def all_variants() -> list[Variant]:
    found: list[Variant] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").VARIANTS
    return found
