"""Weight names by the role that a tensor has in the model, for families whose layers name one tensor for each role."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mii.modeling.families.base import Target
from mii.modeling.spec import ModelSpec


def targets_by_role(
    spec: ModelSpec,
    outer: Mapping[str, str],
    layer: Mapping[str, str],
    *,
    qkv_rows: torch.Tensor | None = None,
    transposed: bool = False,
) -> dict[str, Target]:
    """Where the weights and biases of a model go.

    Args:
        spec: Says what is left out: biases, weights of norms, the head where it is the embedding.
        outer: Names around the layers, without ".weight" and ".bias", by role: "embedding", "positions",
            "embedding norm", "projection in", "norm", "projection out", "head".
        layer: Names in a layer, with "{layer}" for its number, by role: "attention norm", "mlp norm", "q norm" and
            "k norm", "q", "k" and "v" or "qkv", "attention output", "up", "down".
        qkv_rows: The stored row of each row of "qkv", where they are not all queries, all keys, all values.
        transposed: The matrices of the layers are stored as [in, out].
    """
    found: dict[str, Target] = {}
    for role, name in outer.items():
        for kind, path in _outer_paths(spec, role).items():
            found[f"{name}.{kind}"] = Target(path)
    for index in range(spec.num_layers):
        for role, template in layer.items():
            name, (path, part, kinds) = template.format(layer=index), _layer_path(spec, role)
            rows = qkv_rows if role == "qkv" else None
            for kind in kinds:
                target = Target(f"blocks.{index}.{path}.{kind}", part, rows, transposed and kind == "weight")
                found[f"{name}.{kind}"] = target
    return found


def _outer_paths(spec: ModelSpec, role: str) -> dict[str, str]:
    """Paths of the weight and the bias in a role around the layers, for those that the model has."""
    if role in ("norm", "embedding norm"):
        path = "norm" if role == "norm" else "embedding.norm"
        return {kind: f"{path}.{kind}" for kind in _norm_kinds(spec)}
    if role == "head":
        kinds = (not spec.tied_embeddings) * ("weight",) + spec.head_bias * ("bias",)
        return {kind: f"head.{kind}" for kind in kinds}
    return {"weight": _OUTER[role]}


def _layer_path(spec: ModelSpec, role: str) -> tuple[str, str, tuple[str, ...]]:
    """Path below the block and part of a role in a layer, and whether it has a weight and a bias."""
    if role in _NORMS:
        return _NORMS[role], "", _norm_kinds(spec)
    path, part, biased = _LAYER[role]
    if spec.parallel and role in _JOINT:
        path, part = "output", _JOINT[role]
    return path, part, ("weight", "bias") if getattr(spec, biased) else ("weight",)


def _norm_kinds(spec: ModelSpec) -> tuple[str, ...]:
    return spec.norm_weight * ("weight",) + spec.norm_bias * ("bias",)


_OUTER = {
    "embedding": "embedding.weight",
    "positions": "embedding.positions",
    "projection in": "embedding.projection",
    "projection out": "projection.weight",
}
_LAYER = {
    "q": ("attention.qkv", "q", "qkv_bias"),
    "k": ("attention.qkv", "k", "qkv_bias"),
    "v": ("attention.qkv", "v", "qkv_bias"),
    "qkv": ("attention.qkv", "", "qkv_bias"),
    "attention output": ("attention.output", "", "output_bias"),
    "up": ("mlp.up", "", "mlp_bias"),
    "down": ("mlp.down", "", "mlp_bias"),
}
_NORMS = {
    "attention norm": "attention_norm",
    "mlp norm": "mlp_norm",
    "q norm": "attention.q_norm",
    "k norm": "attention.k_norm",
}
_JOINT = {"attention output": "attention", "down": "mlp"}  # parts of a parallel block's one output matrix


def joint_layer(attention: str) -> dict[str, str]:
    """Names in a layer with one matrix for queries, keys and values, `attention` being where it lies: those of Bloom,
    Falcon and GPT-NeoX, which Megatron's went into.
    """
    layer, _, _ = attention.rpartition(".")
    return {
        "qkv": f"{attention}.query_key_value",
        "attention output": f"{attention}.dense",
        "up": f"{layer}.mlp.dense_h_to_4h",
        "down": f"{layer}.mlp.dense_4h_to_h",
    }


def below(prefix: str) -> Callable[[str], str]:
    """Puts a prefix before the names of checkpoints that were saved from the model below its head, without it."""

    def canonical(name: str) -> str:
        return name if name.startswith((prefix, "lm_head.")) else prefix + name

    return canonical


def grouped_rows(q_heads: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """The stored row of each row of [all queries | all keys | all values], where a checkpoint keeps the queries, the
    key and the value of each group of heads together (GPT-NeoX and Bloom with a group for each head, Falcon).
    """
    groups = torch.arange((q_heads + 2 * kv_heads) * head_dim).view(kv_heads, -1, head_dim)
    queries, keys, values = groups[:, :-2], groups[:, -2], groups[:, -1]
    return torch.cat([queries.flatten(), keys.flatten(), values.flatten()])
