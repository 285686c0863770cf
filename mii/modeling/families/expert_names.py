"""Weight names of mixtures of experts, one tensor for each expert or one for all of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from mii.modeling.families.base import Target
from mii.modeling.spec import ModelSpec


def expert_targets(
    spec: ModelSpec,
    module: str = "mlp",
    names: Mapping[str, str] = MappingProxyType({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    shared: str = "shared_expert",
) -> dict[str, Target]:
    """Where routers and experts go that are stored expert by expert.

    Args:
        module: Name of the mixture in a layer.
        names: Names of an expert's matrices.
        shared: Name of the shared expert in the mixture.
    """
    assert spec.experts is not None
    targets = dict(_common(spec, module, shared))
    for source, target in _layers(spec, module):
        for expert in range(spec.experts.count):
            prefix = f"{source}.experts.{expert}"
            targets[f"{prefix}.{names['gate']}.weight"] = Target(f"{target}.up.weight", f"{expert}.gate")
            targets[f"{prefix}.{names['up']}.weight"] = Target(f"{target}.up.weight", f"{expert}.up")
            targets[f"{prefix}.{names['down']}.weight"] = Target(f"{target}.down.weight", str(expert))
    return targets


def stacked_targets(spec: ModelSpec, shared: str = "shared_expert") -> dict[str, Target]:
    """The same where all experts of a layer are one tensor, gate before up, as transformers keeps them in memory."""
    targets = dict(_common(spec, "mlp", shared))
    for source, target in _layers(spec, "mlp"):
        targets[f"{source}.experts.gate_up_proj"] = Target(f"{target}.up.weight")
        targets[f"{source}.experts.down_proj"] = Target(f"{target}.down.weight")
    return targets


def _layers(spec: ModelSpec, module: str) -> Iterator[tuple[str, str]]:
    """Names of the mixtures in a checkpoint, and their paths here."""
    assert spec.experts is not None
    for layer, has_experts in enumerate(spec.experts.layers):
        if has_experts:
            yield f"model.layers.{layer}.{module}", f"blocks.{layer}.mlp"


def _common(spec: ModelSpec, module: str, shared: str) -> Iterator[tuple[str, Target]]:
    """Routers, and shared experts with their gates."""
    experts = spec.experts
    assert experts is not None
    for source, target in _layers(spec, module):
        yield f"{source}.gate.weight", Target(f"{target}.router.weight")
        if experts.choice_bias:
            yield f"{source}.gate.e_score_correction_bias", Target(f"{target}.choice_bias")
        if experts.shared_size and experts.shared_gate:
            yield f"{source}.{shared}_gate.weight", Target(f"{target}.shared_gate.weight")
        for name, path, part in _SHARED if experts.shared_size else ():
            for kind in ("weight", "bias") if spec.mlp_bias else ("weight",):
                yield f"{source}.{shared}.{name}.{kind}", Target(f"{target}.shared.{path}.{kind}", part)


_SHARED = (("gate_proj", "up", "gate"), ("up_proj", "up", "up"), ("down_proj", "down", ""))
