"""Rotary position tables: one row of cosines and sines a position, with every scaling that the Llama family uses.

A row holds `rotary_dim / 2` cosines and then as many sines, in float32. RoPE: Su et al., arXiv 2104.09864. Scalings:
linear position interpolation (arXiv 2306.15595), NTK-aware "dynamic", YaRN (arXiv 2309.00071), and Llama 3.1's
frequency bands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mii.errors import CheckpointError
from mii.modeling.spec import RopeSpec


def read_rope(config: Mapping[str, Any], head_dim: int, *, default_theta: float = 10000.0) -> RopeSpec:
    """Reads rotary settings in both forms that configs come in: `rope_theta` + `rope_scaling`, or `rope_parameters`."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = scaling.get("rope_theta") or config.get("rope_theta") or default_theta
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _FREQUENCIES:
        raise CheckpointError(f"config.json: rope type {kind!r} is not known; supported are {', '.join(_FREQUENCIES)}.")
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    scaling.setdefault("max_position_embeddings", config.get("max_position_embeddings"))
    return RopeSpec(theta=float(theta), rotary_dim=int(head_dim * float(partial)), kind=kind, scaling=scaling)


def context_length(rope: RopeSpec | None, max_positions: int) -> int:
    """How many tokens a model can hold: interpolation by a factor stretches the length that it was trained on."""
    if rope is None or rope.kind not in ("linear", "dynamic", "yarn"):
        return max_positions
    trained = rope.scaling.get("original_max_position_embeddings") if rope.kind == "yarn" else max_positions
    return max(max_positions, int((trained or max_positions) * _number(rope, "factor")))


def rope_table(spec: RopeSpec, positions: int, device: torch.device) -> torch.Tensor:
    """The table [positions, rotary_dim] in float32: cosines in the first half of a row, sines in the second.

    For the "dynamic" kind a position past the trained length is rotated with the base of a context that ends there,
    which is what a decoder does that meets the position while generating.
    """
    frequencies, factor = _FREQUENCIES[spec.kind](spec)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    if spec.kind == "dynamic":
        for position in range(trained_length(spec), positions):
            angles[position] = position * dynamic_frequencies(spec, position + 1)
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * factor).to(device)


def trained_length(spec: RopeSpec) -> int:
    """Tokens that the model was trained on, past which the "dynamic" kind changes its base."""
    return int(_number(spec, "max_position_embeddings"))


def rope_rows(spec: RopeSpec, start: int, size: int, prompt_length: int) -> torch.Tensor:
    """Rows [size, rotary_dim] of the "dynamic" kind for the tokens from `start` on of one long prompt and its answer.

    A prompt longer than the trained length is rotated as a whole with the base of its own length; a generated token
    with the base of the context that it ends.
    """
    rows = []
    for position in range(start, start + size):
        angles = position * dynamic_frequencies(spec, max(prompt_length, position + 1))
        rows.append(torch.cat([angles.cos(), angles.sin()]))
    return torch.stack(rows)


def dynamic_frequencies(spec: RopeSpec, length: int) -> torch.Tensor:
    """Frequencies of the NTK-aware scaling for a context of `length` tokens."""
    trained, factor, width = _number(spec, "max_position_embeddings"), _number(spec, "factor"), spec.rotary_dim
    grown = factor * max(length, trained) / trained - (factor - 1)
    return _inverse_powers(spec.theta * grown ** (width / (width - 2)), width)


def _inverse_powers(theta: float, width: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)


def _number(spec: RopeSpec, name: str) -> float:
    value = spec.scaling.get(name)
    if not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"config.json: rope type {spec.kind!r} needs '{name}' above 0, and it is {value!r}.")
    return float(value)


def _default(spec: RopeSpec) -> tuple[torch.Tensor, float]:
    return _inverse_powers(spec.theta, spec.rotary_dim), 1.0


def _linear(spec: RopeSpec) -> tuple[torch.Tensor, float]:
    return _inverse_powers(spec.theta, spec.rotary_dim) / _number(spec, "factor"), 1.0


def _dynamic(spec: RopeSpec) -> tuple[torch.Tensor, float]:
    return dynamic_frequencies(spec, 0), 1.0


def _llama3(spec: RopeSpec) -> tuple[torch.Tensor, float]:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    frequencies = _inverse_powers(spec.theta, spec.rotary_dim)
    factor, trained = _number(spec, "factor"), _number(spec, "original_max_position_embeddings")
    low, high = _number(spec, "low_freq_factor"), _number(spec, "high_freq_factor")
    turns = trained * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1 - keep) / factor), 1.0


def _yarn(spec: RopeSpec) -> tuple[torch.Tensor, float]:
    """Interpolates dimensions that turn rarely, keeps those that turn often, and scales attention by the table."""
    scaling, width = spec.scaling, spec.rotary_dim
    factor = _number(spec, "factor")
    trained = float(scaling.get("original_max_position_embeddings") or _number(spec, "max_position_embeddings"))
    fast, slow = float(scaling.get("beta_fast") or 32.0), float(scaling.get("beta_slow") or 1.0)

    def dimension(turns: float) -> float:
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(fast), dimension(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    kept = _inverse_powers(spec.theta, width)
    return kept / factor * ramp + kept * (1 - ramp), _yarn_factor(scaling, factor)


def _yarn_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """How much queries and keys grow together: given, or from the scale as in the paper (DeepSeek has two weights)."""
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return growth(mscale) / growth(mscale_all) if mscale and mscale_all else growth(1.0)


_FREQUENCIES: dict[str, Callable[[RopeSpec], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
