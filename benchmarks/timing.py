"""How the kernel benchmarks time a case: what `run(device)` of a benchmarks/kernels_*.py is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

COLD = 256 << 20  # bytes that the large cases cycle through: several times an L2 cache
FLOPS = 1e13  # that a graph of many launches has at most, as far as it has more than a few
WARM = 4 << 20  # cases up to this size find their inputs in the cache, as in a real step

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        kernel: Its name.
        case: What it runs on, in words.
        bytes: Moved at least: every input read once, every output written once.
        make: Allocates one set of tensors on a device and returns the call on them.
        flops: Done, where arithmetic may be the limit.
    """

    kernel: str
    case: str
    bytes: int
    make: Callable[[torch.device], Call]
    flops: int = 0


def run_cases(cases: Iterable[Case], device: torch.device) -> list[dict[str, Any]]:
    """Every case's median time; on a GPU inside a CUDA graph of many launches, as in a step."""
    results = []
    for case in cases:
        copies = max(1, min(16, COLD // case.bytes)) if case.bytes > WARM else 1
        calls = [case.make(device) for _ in range(copies)]
        if device.type == "cuda":
            seconds = graph_seconds(calls, launches=max(4, min(32, int(FLOPS / max(1, case.flops)))))
        else:
            seconds = _host_seconds(calls)
        result = {"kernel": case.kernel, "case": case.case, "seconds": seconds, "bytes": case.bytes}
        results.append(result | ({"flops": case.flops} if case.flops else {}))
    return results


def graph_seconds(calls: list[Call], launches: int = 32, replays: int = 20) -> float:
    """Median time of one launch within a graph of many, the calls taking turns."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Threads of libraries (NCCL's watchdog) ask for events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(launches):
            calls[i % len(calls)]()
    times = []
    for turn in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 3:  # the first ones bring the clocks up
            times.append(begin.elapsed_time(end) / 1e3 / launches)
    return statistics.median(times)


def _host_seconds(calls: list[Call], rounds: int = 30) -> float:
    times = []
    for turn in range(rounds + 3):
        begin = time.perf_counter()
        calls[turn % len(calls)]()
        if turn >= 3:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)
