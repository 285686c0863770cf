"""Where the memory of a run went."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from mii.engine import Engine
from mii.engine.costs import count_weights
from mii.parallel.engines import FirstEngine

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Starts the search for the peak anew, so that what was measured before does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def memory_ledger(engine: Engine | FirstEngine) -> dict[str, int]:
    """Bytes by use, of several ranks those of the first: a partition of "used", which on a GPU is all that the driver
    has given away, to others too.

    On a GPU: weights; kv_cache; graphs (those that were captured at the start; others are in `driver`); activations,
    the buffers of a step; tensors, the most that torch held beside these since `reset_peak`; unused, what torch keeps
    for later; peers, what ranks write into for each other; driver, what is none of torch's: context, kernels,
    libraries. On a CPU what is none of the first four is
    not told apart, and "used" is the most that was resident: pages that nothing was written to, of the cache and of the
    buffers, do not count.
    """
    runner = engine.runner
    assert runner is not None
    ledger = {
        "weights": count_weights(runner.spec) * runner.dtype.itemsize,
        "kv_cache": engine.num_blocks * runner.block_bytes,
        "graphs": runner.graph_bytes,
        "activations": runner.arena.num_bytes,
    }
    if runner.device.type != "cuda":
        return ledger | {"used": _resident_peak()}
    free, total = torch.cuda.mem_get_info(runner.device)
    most, kept = torch.cuda.max_memory_allocated(runner.device), torch.cuda.memory_reserved(runner.device)
    known = ledger["weights"] + ledger["kv_cache"] + ledger["activations"]
    used = total - free
    group = runner.model.place.group
    peers = 0 if group is None else group.num_bytes
    outside = used - kept - ledger["graphs"] - peers
    torchs = {"tensors": most - known, "unused": max(0, kept - most)}
    return ledger | torchs | {"peers": peers, "driver": outside, "used": used}


def beside_the_model(ledger: dict[str, int]) -> int:
    """Bytes of a GPU that are neither weights nor cache nor graphs."""
    return ledger["used"] - ledger["weights"] - ledger["kv_cache"] - ledger["graphs"]


def _resident_peak() -> int:
    lines = _STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
