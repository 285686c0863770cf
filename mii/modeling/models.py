"""From a checkpoint to a model that can run: choose the family, make parameters, read each tensor into its place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mii.errors import CheckpointError, UnsupportedModelError
from mii.logging import logger
from mii.modeling.config_reader import ConfigReader
from mii.modeling.decoder import Decoder
from mii.modeling.experts import ExpertStack
from mii.modeling.families import FAMILIES, Family, Target
from mii.modeling.parameters import Linear, Parameter, Placement
from mii.ops.all_reduce import Group
from mii.progress import progress_bar

if TYPE_CHECKING:
    from mii.modeling.checkpoint import Checkpoint


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config, by its `architectures`.

    Raises:
        UnsupportedModelError: None of them is known, and the message lists those that are; or weights are quantised.
        CheckpointError: It is no list of names.
    """
    if config.get("quantization_config"):
        quantised = ConfigReader(config).fields("quantization_config")
        raise UnsupportedModelError(
            f"config.json: the weights are quantised ('quant_method' is {quantised.get('quant_method')!r}). Take a "
            "checkpoint in bf16, fp16 or fp32, or a GGUF file, which may be quantised."
        )
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"config.json: 'architectures' must be a list of names, and it is {names!r}.")
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    by_type = {family.name: family for family in FAMILIES.values()}
    if not names and str(config.get("model_type")) in by_type:
        return by_type[str(config["model_type"])]
    given = ", ".join(names) or f"model_type {config.get('model_type')!r}"
    raise UnsupportedModelError(
        f"The model's architecture is {given}; supported are {', '.join(sorted(FAMILIES))}. "
        "docs/adding-a-model.md shows how to add one."
    )


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    progress: bool | None = None,
    group: Group | None = None,
) -> Decoder:
    """Reads a checkpoint into a model on `device`, converted to `dtype`, tensor by tensor into the fused layout.

    Args:
        checkpoint: The weights; a rank of a group reads its own part of each.
        device: Where they go.
        dtype: What they become.
        progress: Show a progress bar.
        group: The ranks that the model is divided among.

    Raises:
        PlacementError: The model cannot be divided among so many ranks.
        UnsupportedModelError: The architecture is none of the supported ones.
        CheckpointError: A config field or a tensor is missing, unexpected or of another shape.
    """
    family = find_family(checkpoint.config)
    spec = family.read_spec(checkpoint.config)
    started = time.monotonic()
    part = spec if group is None else spec.sharded(group.rank, group.size)
    model = Decoder(part, Placement(device, dtype, group))
    present = {family.canonical(name): name for name in checkpoint.names()}
    targets = family.targets(spec, set(present))
    _fill(model, checkpoint, targets, _stored_names(checkpoint, family, targets, present), progress)
    model.finish()
    logger.info("read %d tensors of %s in %.2f s", len(targets), checkpoint.path, time.monotonic() - started)
    return model


def _stored_names(
    checkpoint: Checkpoint, family: Family, targets: Mapping[str, Target], present: Mapping[str, str]
) -> dict[str, str]:
    """What the checkpoint calls each tensor. Reports what is missing and what nobody knows before a byte is read.
    `present` has its names by their canonical ones.
    """
    missing = sorted(set(targets) - set(present))
    if missing:
        raise CheckpointError(f"{checkpoint.path}: {len(missing)} weights are missing: {_some(missing)}.")
    tied = {"lm_head.weight"}
    unwanted = {n for n in present if n.endswith(family.ignored) or n.startswith(family.left_out)}
    extra = sorted(set(present) - set(targets) - tied - unwanted)
    if extra:
        raise CheckpointError(
            f"{checkpoint.path}: {len(extra)} weights have no place in a {family.name} model: {_some(extra)}. "
            "Either the config does not belong to these weights or this variant is not supported."
        )
    return {name: present[name] for name in targets}


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _fill(
    model: Decoder,
    checkpoint: Checkpoint,
    targets: Mapping[str, Target],
    stored: Mapping[str, str],
    progress: bool | None,
) -> None:
    parameters = dict(model.parameters())
    # In the model's order, so that each matrix is complete, packed and its parts forgotten before the next one starts.
    order = {path: index for index, path in enumerate(parameters)}
    names = sorted(targets, key=lambda name: order[targets[name].path])
    owners = {path: module for path, module in model.modules() if isinstance(module, Linear | ExpertStack)}
    checkpoint.prefetch({stored[name]: _extent(parameters[targets[name].path], targets[name]) for name in names})
    total = sum(parameters[targets[name].path].view(targets[name].part).numel() for name in names)
    with progress_bar("weights", total * model.place.dtype.itemsize, unit="B", enabled=progress) as bar:
        for name in names:
            target = targets[name]
            size = _read(checkpoint, stored[name], parameters[target.path], target)
            bar.update(size)
            owner = owners.get(target.path.rpartition(".")[0])
            if owner is not None and owner.complete:
                owner.finish()


def _read(checkpoint: Checkpoint, name: str, parameter: Parameter, target: Target) -> int:
    """Copies one tensor into its place, converting on the way; returns the bytes written."""
    shape, expected = tuple(checkpoint.shape(name)), target.stored_shape(parameter.whole_shape(target.part))
    if shape != expected:
        raise CheckpointError(
            f"{checkpoint.path}: {name} has shape {list(shape)}, the config asks for {list(expected)}."
        )
    for view, wanted, dim in parameter.pieces(target.part):
        stored = checkpoint.get(name, parameter.tensor.dtype, target.slices(dim, wanted, len(shape)))
        view.copy_(target.arranged(stored, dim, wanted))
    parameter.filled(target.part)
    return parameter.view(target.part).numel() * parameter.tensor.element_size()


def _extent(parameter: Parameter, target: Target) -> tuple[slice, ...] | None:
    """Slices of a checkpoint's tensor around all that a parameter takes of it; None: all of it."""
    pieces = parameter.pieces(target.part)
    if len(pieces) > 1:
        return None
    return target.slices(pieces[0].dim, pieces[0].wanted, len(parameter.whole_shape(target.part)))


def stop_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Every end-of-text id that the config or the generation config names, each once; a negative one means none.

    Raises:
        CheckpointError: One of them is no number.
    """
    found: dict[int, None] = {}
    for name, source in (("generation_config.json", generation_config), ("config.json", config)):
        ids = source.get("eos_token_id")
        for token in ids if isinstance(ids, list | tuple) else [-1 if ids is None else ids]:
            if type(token) is not int:
                raise CheckpointError(f"{name}: 'eos_token_id' must be null, a number or a list of them, not {ids!r}.")
            if token >= 0:
                found[token] = None
    return tuple(found)
