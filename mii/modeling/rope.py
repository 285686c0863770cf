"""Rotary position tables: one row of cosines and sines a position, with every scaling that the Llama family uses.

A row holds `rotary_dim / 2` cosines and then as many sines, in float32. RoPE: Su et al., arXiv 2104.09864. Scalings:
linear position interpolation (arXiv 2306.15595), NTK-aware "dynamic" and Qwen's "prompt_ntk", YaRN (arXiv 2309.00071),
LongRoPE (arXiv 2402.13753), and Llama 3.1's frequency bands.

LongRoPE divides each frequency by a factor of its own, by one list in contexts up to the trained length and by another
in longer ones: `switch_length` and the `long` tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mii.errors import CheckpointError
from mii.modeling.config_reader import ConfigReader, is_above_zero
from mii.modeling.spec import RopeSpec


def read_rope(config: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """Reads rotary settings in both forms that configs come in: `rope_theta` + `rope_scaling`, or `rope_parameters`."""
    scaling = _scaling(ConfigReader(config))
    kind = scaling.get("rope_type", "default")
    kind = _OLD_NAMES.get(kind, kind) if isinstance(kind, str) else repr(kind)
    if kind not in _FREQUENCIES:
        raise CheckpointError(f"config.json: rope type {kind!r} is not known; supported are {', '.join(_FREQUENCIES)}.")
    read = ConfigReader({**config, **scaling})
    theta = read.number("rope_theta", 10000.0)
    if theta <= 1:
        raise CheckpointError(f"config.json: 'rope_theta' must be a number above 1, and it is {theta:g}.")
    scaling.setdefault("max_position_embeddings", config.get("max_position_embeddings"))
    # Phi-3 keeps the trained length beside the other settings, and there it counts.
    if config.get("original_max_position_embeddings"):
        scaling["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    rotary_dim = _rotary_dim(read.number("partial_rotary_factor", 1.0), head_dim)
    rope = RopeSpec(theta=theta, rotary_dim=rotary_dim, kind=kind, scaling=scaling)
    _FREQUENCIES[kind](rope)  # what the kind needs and the config lacks is named now
    return rope


def _scaling(config: ConfigReader) -> dict[str, Any]:
    """What both forms say; a kind is called "rope_type" here, and left out where it is null."""
    forms: dict[str, dict[str, Any]] = {}
    for form in ("rope_parameters", "rope_scaling"):
        given = {name: value for name, value in config.fields(form).items() if value is not None}
        kind = given.pop("type", None)
        forms[form] = given if kind is None else {"rope_type": kind, **given}
    one, other = forms.values()
    for name in one.keys() & other.keys():
        if one[name] != other[name]:
            raise CheckpointError(
                f"config.json: '{name}' is {one[name]!r} in 'rope_parameters' and {other[name]!r} in 'rope_scaling', "
                "but they mean the same; leave one of them out."
            )
    return one | other


def _rotary_dim(partial: float, head_dim: int) -> int:
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim > head_dim or rotary_dim % 2:
        raise CheckpointError(
            f"config.json: 'partial_rotary_factor' {partial} of a head of {head_dim} is {rotary_dim} dimensions; it "
            f"must be an even number from 2 to {head_dim}."
        )
    return rotary_dim


def context_length(rope: RopeSpec | None, max_positions: int) -> int:
    """How many tokens a model can hold: interpolation by a factor stretches the length that it was trained on."""
    if rope is None or rope.kind not in ("linear", "dynamic", "yarn"):
        return max_positions
    trained = _optional(rope, "original_max_position_embeddings") if rope.kind == "yarn" else None
    return max(max_positions, int((trained or max_positions) * _number(rope, "factor")))


def switch_length(spec: RopeSpec) -> int:
    """The context length past which the "longrope" kind takes its long factors, for all tokens; 0 for all others."""
    if spec.kind != "longrope" or spec.scaling["short_factor"] == spec.scaling["long_factor"]:
        return 0
    return _trained(spec)


def rope_table(spec: RopeSpec, positions: int, device: torch.device, *, long: bool = False) -> torch.Tensor:
    """The table [positions, rotary_dim] in float32: cosines in the first half of a row, sines in the second.

    For the "dynamic" kind a position past the trained length is rotated with the base of a context that ends there,
    which is what a decoder does that meets the position while generating. `long` asks for the factors of contexts
    longer than `switch_length`; other kinds have one table for all contexts.
    """
    read = _long if long and spec.kind == "longrope" else _FREQUENCIES[spec.kind]
    frequencies, factor = read(spec)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    if spec.kind == "dynamic":
        for position in range(trained_length(spec), positions):
            angles[position] = position * dynamic_frequencies(spec, position + 1)
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * factor).to(device)


def trained_length(spec: RopeSpec) -> int:
    """Tokens that the model was trained on, past which the kinds in `BY_LENGTH` change their base."""
    return int(_number(spec, "max_position_embeddings"))


def rope_rows(spec: RopeSpec, start: int, size: int, prompt_length: int) -> torch.Tensor:
    """Rows [size, rotary_dim] of the kinds in `BY_LENGTH` for the tokens from `start` on of one long prompt and its
    answer.

    A prompt longer than the trained length is rotated as a whole with the base of its own length. A generated token has
    the base of the context that it ends ("dynamic"), or its prompt's ("prompt_ntk").
    """
    rows = []
    for position in range(start, start + size):
        length = max(prompt_length, position + 1) if spec.kind == "dynamic" else prompt_length
        angles = position * dynamic_frequencies(spec, length)
        rows.append(torch.cat([angles.cos(), angles.sin()]))
    return torch.stack(rows)


def dynamic_frequencies(spec: RopeSpec, length: int) -> torch.Tensor:
    """Frequencies of the NTK-aware scaling for a context of `length` tokens."""
    trained, width = _number(spec, "max_position_embeddings"), spec.rotary_dim
    stretch = max(length, trained) / trained
    if spec.kind == "dynamic":
        factor = _number(spec, "factor")
        grown = factor * stretch - (factor - 1)
    else:
        grown = 2.0 ** math.ceil(math.log2(stretch) + 1) - 1
    return _inverse_powers(spec.theta * grown ** (width / (width - 2)), width)


def _inverse_powers(theta: float, width: int, factors: torch.Tensor | float = 1.0) -> torch.Tensor:
    return 1.0 / (factors * theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))


def _number(spec: RopeSpec, name: str) -> float:
    value = spec.scaling.get(name)
    if not is_above_zero(value):
        raise CheckpointError(f"config.json: rope type {spec.kind!r} needs '{name}' above 0, and it is {value!r}.")
    return float(spec.scaling[name])


def _optional(spec: RopeSpec, name: str) -> float | None:
    """None where the config has none, or 0, which means the same."""
    return _number(spec, name) if spec.scaling.get(name) not in (None, 0) else None


def _trained(spec: RopeSpec) -> int:
    """The trained length, which the extended one may have taken the place of in the config."""
    return int(_optional(spec, "original_max_position_embeddings") or _number(spec, "max_position_embeddings"))


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


def _short(spec: RopeSpec) -> tuple[torch.Tensor, float]:
    _long(spec)  # both lists have to be right
    return _stretched(spec, "short_factor")


def _long(spec: RopeSpec) -> tuple[torch.Tensor, float]:
    return _stretched(spec, "long_factor")


def _stretched(spec: RopeSpec, name: str) -> tuple[torch.Tensor, float]:
    """Each frequency over its own factor; attention grows with the stretch, by the root of its logarithm."""
    factors, half = spec.scaling.get(name), spec.rotary_dim // 2
    if not isinstance(factors, list) or len(factors) != half or not all(is_above_zero(each) for each in factors):
        count = len(factors) if isinstance(factors, list) else repr(factors)
        raise CheckpointError(
            f"config.json: rope type 'longrope' needs '{name}' with {half} numbers above 0, one for each frequency, "
            f"and it has {count}."
        )
    trained, scaling = _trained(spec), spec.scaling
    given = _optional(spec, "attention_factor")
    stretch = scaling.get("factor") or _number(spec, "max_position_embeddings") / trained
    if given is None:
        given = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(trained))
    return _inverse_powers(spec.theta, spec.rotary_dim, torch.tensor(factors, dtype=torch.float32)), float(given)


def _yarn(spec: RopeSpec) -> tuple[torch.Tensor, float]:
    """Interpolates dimensions that turn rarely, keeps those that turn often, and scales attention by the table."""
    scaling, width = spec.scaling, spec.rotary_dim
    factor = _number(spec, "factor")
    trained = float(_trained(spec))
    fast, slow = _optional(spec, "beta_fast") or 32.0, _optional(spec, "beta_slow") or 1.0

    def dimension(turns: float) -> float:
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(fast), dimension(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    kept = _inverse_powers(spec.theta, width)
    return kept / factor * ramp + kept * (1 - ramp), _yarn_factor(spec, factor)


def _yarn_factor(spec: RopeSpec, factor: float) -> float:
    """How much queries and keys grow together: given, or from the scale as in the paper (DeepSeek has two weights)."""
    given = _optional(spec, "attention_factor")
    if given is not None:
        return given

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = _optional(spec, "mscale"), _optional(spec, "mscale_all_dim")
    return growth(mscale) / growth(mscale_all) if mscale and mscale_all else growth(1.0)


_FREQUENCIES: dict[str, Callable[[RopeSpec], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "prompt_ntk": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _short,
}
_OLD_NAMES = {"su": "longrope"}
BY_LENGTH = ("dynamic", "prompt_ntk")  # kinds that rotate a prompt past the trained length by its own length
