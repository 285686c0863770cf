"""How families read a checkpoint's config: each field with its type, and an error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from mii.errors import CheckpointError
from mii.modeling.spec import ExpertsSpec


class Sizes(TypedDict):
    """The fields of a `ModelSpec` that nearly all families read alike; windows and scale as they are with no option."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    attention_scale: float


class ConfigReader:
    """Typed reads from a checkpoint's config. What is missing or of the wrong kind is named in the error.

    Args:
        config: As in config.json.
        aliases: Other names that a field has in some configs, by the name it is read under.

    Raises:
        CheckpointError: A field has two values, under two of its names.
    """

    def __init__(self, config: Mapping[str, Any], aliases: Mapping[str, Sequence[str]] | None = None) -> None:
        self.config = dict(config)
        for name, others in (aliases or {}).items():
            given = {key: config[key] for key in (name, *others) if config.get(key) is not None}
            if len(set(map(repr, given.values()))) > 1:
                both = " and ".join(f"'{key}' is {value!r}" for key, value in given.items())
                raise CheckpointError(f"config.json: {both}, but they mean the same.")
            if given:
                self.config[name] = next(iter(given.values()))

    def required_integer(self, name: str) -> int:
        value = self.config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: '{name}' must be a positive whole number, and it is {value!r}.")
        return value

    def integer(self, name: str, default: int) -> int:
        return default if self.config.get(name) is None else self.required_integer(name)

    def count(self, name: str, default: int) -> int:
        """A whole number that may be 0."""
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"config.json: '{name}' must be a whole number of at least 0, and it is {value!r}.")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.config.get(name)
        if value is None:
            return default
        if not is_above_zero(value):
            raise CheckpointError(f"config.json: '{name}' must be a number above 0, and it is {value!r}.")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: '{name}' must be true or false, and it is {value!r}.")
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            raise CheckpointError(f"config.json: '{name}' is {value!r}; supported are {', '.join(sorted(choices))}.")
        return choices[value]

    def fields(self, name: str) -> Mapping[str, Any]:
        """An object's fields; none where it is missing or null."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: '{name}' must be null or an object, and it is {value!r}.")
        return value or {}

    def layers(self, name: str, count: int) -> tuple[int, ...]:
        """Numbers of layers, below `count`; none where the field is missing."""
        value = [] if self.config.get(name) is None else self.config[name]
        if not isinstance(value, list) or not all(type(layer) is int and 0 <= layer < count for layer in value):
            raise CheckpointError(f"config.json: '{name}' must list layers from 0 to {count - 1}, and it is {value!r}.")
        return tuple(value)

    def experts(self, experts: ExpertsSpec) -> ExpertsSpec:
        """The argument, unless a token would go to more experts than there are."""
        if experts.top_k > experts.count:
            raise CheckpointError(
                f"config.json: a token cannot go to {experts.top_k} experts ('num_experts_per_tok') of {experts.count}."
            )
        return experts

    def heads(self, *, grouped: bool = True) -> tuple[int, int, int]:
        """Query heads, key/value heads and head size; grouped heads must divide evenly.

        With `grouped=False` each query head has a key head and all of them make up the hidden size, whatever else the
        config says: in families that have no fields for it.
        """
        q_heads = self.required_integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", q_heads) if grouped else q_heads
        if q_heads % kv_heads:
            raise CheckpointError(
                f"config.json: {q_heads} attention heads cannot share {kv_heads} key/value heads evenly."
            )
        hidden = self.required_integer("hidden_size")
        given = grouped and self.config.get("head_dim") is not None
        if not given and hidden % q_heads:
            raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of {q_heads} attention heads.")
        return q_heads, kv_heads, self.required_integer("head_dim") if given else hidden // q_heads

    def sizes(self, *, grouped: bool = True) -> Sizes:
        """Vocabulary, widths, layers and heads, the latter as in `heads`."""
        q_heads, kv_heads, head_dim = self.heads(grouped=grouped)
        layers = self.required_integer("num_hidden_layers")
        return {
            "vocab_size": self.required_integer("vocab_size"),
            "hidden_size": self.required_integer("hidden_size"),
            "num_layers": layers,
            "q_heads": q_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "windows": (0,) * layers,
            "attention_scale": head_dim**-0.5,
        }


def is_above_zero(value: Any) -> bool:
    """Whether a config's value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
}
