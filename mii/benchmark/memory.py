"""Where the memory of a run went."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from mii.engine import Engine
from mii.modeling.decoder import Decoder
from mii.modeling.parameters import Placement

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Starts the search for the peak anew, so that what was measured before does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def memory_ledger(engine: Engine) -> dict[str, int]:
    """Bytes of the weights and of the KV cache as reserved, and the most that was in use since `reset_peak`.

    In use is what torch allocated on a GPU, where the ledger also says what was neither weights nor cache. On a CPU it
    is the resident memory of the process, in which pages of the cache that nothing was written to do not count.
    """
    runner = engine.runner
    assert runner is not None
    outline = Decoder(runner.spec, Placement(torch.device("meta"), runner.dtype)).parameters()
    weights = sum(parameter.tensor.numel() for _, parameter in outline) * runner.dtype.itemsize
    cache = engine.num_blocks * engine.block_size * runner.spec.kv_bytes_per_token(runner.dtype.itemsize)
    if runner.device.type != "cuda":
        return {"weights": weights, "kv_cache": cache, "peak": _resident_peak()}
    peak = torch.cuda.max_memory_allocated(runner.device)
    return {"weights": weights, "kv_cache": cache, "other": peak - weights - cache, "peak": peak}


def _resident_peak() -> int:
    lines = _STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
