"""What a family is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mii.modeling.spec import ModelSpec


class Target(NamedTuple):
    """Where a checkpoint tensor goes: the path of a parameter, and the part of it (empty: all of it)."""

    path: str
    part: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    Args:
        name: `model_type` in the config.
        architectures: Names in the config's `architectures`.
        read_spec: Reads the config; raises CheckpointError naming the field that is missing, wrong or not supported.
        weights: Checkpoint tensor names and their targets, for a spec.
        ignored: Ends of tensor names that checkpoints may hold and nothing needs (tables that are computed).
    """

    name: str
    architectures: tuple[str, ...]
    read_spec: Callable[[Mapping[str, Any]], ModelSpec]
    weights: Callable[[ModelSpec], dict[str, Target]]
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
