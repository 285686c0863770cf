"""From a `ModelConfig` to a ready engine: device, weights, buffers, and as large a KV cache as memory allows."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import torch

from mii.batching.pace import Pace, make_pace
from mii.config import DSStateManagerConfig, ModelConfig
from mii.engine.capture import AMONG_RANKS, capture_steps, graph_memory
from mii.engine.choices import choose_products
from mii.engine.costs import count_weights
from mii.engine.devices import choose_device, choose_dtype, free_memory
from mii.engine.engine import Engine
from mii.engine.graphs import CAPTURE_SECONDS
from mii.engine.pacing import measure_costs
from mii.engine.profile import StepProfile
from mii.engine.runner import Runner, RunnerLimits
from mii.engine.startup import StartReport
from mii.errors import CheckpointError, OutOfMemoryError
from mii.logging import logger
from mii.modeling.checkpoint import Checkpoint, open_checkpoint
from mii.modeling.checkpoint.read_ahead import ReadAhead, reads_ahead
from mii.modeling.decoder import Decoder
from mii.modeling.models import find_family, load_model, stop_ids
from mii.modeling.parameters import Placement
from mii.modeling.spec import ModelSpec
from mii.ops import native
from mii.ops.all_reduce import Group

if TYPE_CHECKING:
    from mii.parallel.engines import FirstEngine, OtherEngine
    from mii.parallel.ranks import Ranks

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class _Defaults:
    """Used where the config leaves the choice: tokens and sequences a step, block size, share of free memory."""

    max_tokens: int
    max_sequences: int
    block_size: int
    memory_fraction: float


_DEFAULTS = {
    "cuda": _Defaults(max_tokens=8192, max_sequences=1024, block_size=64, memory_fraction=0.9),
    "cpu": _Defaults(max_tokens=512, max_sequences=256, block_size=32, memory_fraction=0.4),
}


def load_engine(config: ModelConfig, progress: bool | None = None) -> Engine:
    """Opens the checkpoint a config names and builds its engine.

    Raises:
        mii.errors.LoadError: Whatever keeps the model from being ready, in one sentence; nothing stays allocated.
    """
    with open_checkpoint(
        config.model_name_or_path, revision=config.revision, trust_remote_code=config.trust_remote_code
    ) as checkpoint:
        return build_engine(config, checkpoint, progress)


@overload
def build_engine(
    config: ModelConfig, checkpoint: Checkpoint, progress: bool | None = ..., ranks: None = ...
) -> Engine: ...
@overload
def build_engine(
    config: ModelConfig, checkpoint: Checkpoint, progress: bool | None, ranks: Ranks | None
) -> Engine | FirstEngine | OtherEngine: ...
def build_engine(
    config: ModelConfig, checkpoint: Checkpoint, progress: bool | None = None, ranks: Ranks | None = None
) -> Engine | FirstEngine | OtherEngine:
    """The engine of an opened checkpoint; with `ranks`, what this one has of it (within `ranks.loading`)."""
    start, group = StartReport(), None if ranks is None else ranks.group
    device = choose_device(config.device, config.local_device)
    dtype = choose_dtype(config.dtype, checkpoint.config, device)
    spec = find_family(checkpoint.config).read_spec(checkpoint.config)
    limits, ends = _limits(config, spec, device), stop_ids(checkpoint.config, checkpoint.generation_config)
    free = free_memory(device)
    _check_weights_fit(spec, device, dtype, free, group)
    try:
        with start.phase("weights"):
            show = config.progress if progress is None else progress
            if group is None and reads_ahead(checkpoint, device):
                with ReadAhead(checkpoint, device) as ahead:
                    model = load_model(ahead, device, dtype, progress=show)
            else:
                model = load_model(checkpoint, device, dtype, progress=show, group=group)
        with start.phase("buffers"):
            largest = spec if group is None else spec.sharded(0, group.size)
            runner = Runner(model, limits, ends, weights=count_weights(largest))
        if ranks is not None:
            ranks.compare(checkpoint, _options(config, dtype, limits))
        if device.type == "cuda":
            with start.phase("products"):
                start.note(choose_products(runner))
        _make_cache(config, runner, free, start, ranks)
        pace = _pace(config, runner, start)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemoryError(
            f"{'The GPU' if device.type == 'cuda' else 'This machine'} ran out of memory while loading: "
            f"{free / _GIB:.1f} GiB were free, {free_memory(device) / _GIB:.1f} GiB are free again now. Lower "
            f"memory_fraction or max_length, which is {limits.max_length}, or take a smaller model."
        ) from error
    engine = Engine(
        runner,
        stop_ids=ends,
        max_length=limits.max_length,
        prefix_caching=config.prefix_caching,
        pace=pace,
        profile=StepProfile(device, average=config.profile_model_time, synchronise=config.sync_debug),
    )
    if ranks is None or ranks.rank == 0:
        _report(runner)
        start.log()
    engine.start_report = start
    return engine if ranks is None else ranks.engine(engine)


def _options(config: ModelConfig, dtype: torch.dtype, limits: RunnerLimits) -> str:
    """What all ranks must have been asked for alike."""
    pace = f"optimize_for={config.optimize_for}, target_token_ms={config.target_token_ms}"
    return f"{dtype}, {limits}, prefix_caching={config.prefix_caching}, {pace}"


def _make_cache(
    config: ModelConfig, runner: Runner, free_at_start: int, start: StartReport, ranks: Ranks | None
) -> None:
    """The KV cache, and on a GPU the graphs, whose memory is set aside first."""
    reserved, captures = 0, runner.graphs is not None and (ranks is None or AMONG_RANKS)
    if captures:
        with start.phase("first steps"):
            reserved = graph_memory(runner, lambda: free_memory(runner.device))
            start.note(f"{reserved / _GIB:.2f} GiB set aside for graphs")
    with start.phase("KV cache"):
        blocks = _num_blocks(config, runner, free_at_start, reserved)
        runner.make_cache(blocks if ranks is None else ranks.least_room(blocks))
    if captures:
        with start.phase("graphs"):
            before = free_memory(runner.device)
            captured = capture_steps(runner, CAPTURE_SECONDS)
            runner.graph_bytes = max(0, before - free_memory(runner.device))
            start.note(f"{captured.graphs} of {captured.planned}; the others when they are used")


def _pace(config: ModelConfig, runner: Runner, start: StartReport) -> Pace | None:
    """The time for a token that the config asks for; None where it asks for none."""
    if config.target_token_ms is None and config.optimize_for == "throughput":
        return None
    with start.phase("pace"):
        target = None if config.target_token_ms is None else config.target_token_ms / 1e3
        pace = make_pace(measure_costs(runner), target, least=runner.limits.block_size)
        start.note(f"{1e3 * pace.seconds:.1f} ms a token")
    group = runner.model.place.group
    if target is not None and target < pace.seconds and (group is None or group.rank == 0):
        logger.warning(
            "target_token_ms is %g and a step of this model takes %.1f ms here; %.1f ms are aimed at",
            config.target_token_ms, 1e3 * pace.costs.step, 1e3 * pace.seconds,
        )  # fmt: skip
    return pace


def _limits(config: ModelConfig, spec: ModelSpec, device: torch.device) -> RunnerLimits:
    """Sizes of a step from the config, where it sets them, and else from the kind of device."""
    manager, default = config.inference_engine_config.state_manager, _DEFAULTS[device.type]
    given = manager.model_fields_set
    max_tokens = manager.max_ragged_batch_size if "max_ragged_batch_size" in given else default.max_tokens
    counted = "max_ragged_sequence_count" in given or "max_ragged_batch_size" in given
    max_sequences = manager.max_ragged_sequence_count if counted else default.max_sequences
    max_sequences = min(max_sequences, max_tokens, manager.max_tracked_sequences)
    return RunnerLimits(
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        max_slots=manager.max_tracked_sequences,
        max_length=_max_length(config, manager, spec),
        block_size=config.block_size or default.block_size,
    )


def _max_length(config: ModelConfig, manager: DSStateManagerConfig, spec: ModelSpec) -> int:
    longest = spec.max_positions
    if "max_context" in manager.model_fields_set:
        longest = min(longest, manager.max_context)
    if config.max_length is None:
        return longest
    if config.max_length > spec.max_positions:
        raise CheckpointError(
            f"max_length={config.max_length} is more than the {spec.max_positions} positions that this model has; "
            "give no more than that, or leave it out."
        )
    return min(longest, config.max_length)


def _sharing(device: torch.device, group: Group | None) -> int:
    """How many ranks take their memory from the same device."""
    return group.local_size if group is not None and device.type == "cpu" else 1


def _check_weights_fit(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, free: int, group: Group | None = None
) -> None:
    mine = spec if group is None else spec.sharded(group.rank, group.size)
    outline = Decoder(mine, Placement(torch.device("meta"), dtype))
    needed = sum(p.tensor.numel() for _, p in outline.parameters()) * dtype.itemsize * _sharing(device, group)
    if needed > free:
        raise OutOfMemoryError(
            f"The weights take {needed / _GIB:.1f} GiB in {str(dtype).removeprefix('torch.')} and {free / _GIB:.1f} "
            "GiB "
            f"are free on {device}. Free some, or take a smaller model or number format."
        )


def _num_blocks(config: ModelConfig, runner: Runner, free_at_start: int, reserved: int = 0) -> int:
    """How many KV blocks memory allows, or the config says. `reserved`: bytes that will be taken later. Ranks on one
    CPU share what there is.

    Raises:
        OutOfMemoryError: Not even one sequence of one block fits.
    """
    manager, limits = config.inference_engine_config.state_manager, runner.limits
    memory = manager.memory_config
    if "memory_config" in manager.model_fields_set and memory.mode == "allocate":
        return memory.size
    default = _DEFAULTS[runner.device.type].memory_fraction
    fraction = config.memory_fraction if "memory_fraction" in config.model_fields_set else default
    free = free_memory(runner.device) - reserved
    budget = int(fraction * free_at_start) - max(0, free_at_start - free)  # others may have given some back
    if "memory_config" in manager.model_fields_set or runner.device.type == "cuda":
        budget = min(budget, free - memory.size)
    blocks = budget // _sharing(runner.device, runner.model.place.group) // runner.block_bytes
    if blocks < 1:
        raise OutOfMemoryError(
            f"After the weights {free / _GIB:.2f} GiB are free on {runner.device}. memory_fraction={fraction} allows "
            f"{fraction * free_at_start / _GIB:.2f} of the {free_at_start / _GIB:.2f} GiB that were free at start, "
            "which "
            f"leaves no room for a KV block of {runner.block_bytes / (1 << 20):.1f} MiB. Raise it or take a smaller "
            "model."
        )
    return min(blocks, limits.max_slots * limits.max_blocks)


def _report(runner: Runner) -> None:
    limits, blocks = runner.limits, runner.num_blocks
    library = native.library(runner.device)
    logger.info(
        "%s model on %s in %s: KV cache of %d blocks of %d tokens = %d tokens (%.2f GiB), steps of up to %d tokens and "
        "%d sequences, kernels: %s",
        runner.spec.family,
        runner.device,
        str(runner.dtype).removeprefix("torch."),
        blocks,
        limits.block_size,
        blocks * limits.block_size,
        blocks * runner.block_bytes / _GIB,
        limits.max_tokens,
        limits.max_sequences,
        library.build_info() if library is not None else "plain torch (no native library found)",
    )
