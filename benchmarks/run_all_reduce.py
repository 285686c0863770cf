"""Sums over the ranks of one host, ours beside NCCL's or gloo's, in microseconds by size.

    torchrun --nproc_per_node 4 benchmarks/run_all_reduce.py [--device cpu] [--json FILE] [--width 8192]

Each figure is the median time of one call within a CUDA graph of 32, as in a step; of the ranks the slowest counts.
`norm`: the sum, the addition to the residual and the RMSNorm of rows of `--width` bfloat16, as one kernel, and with
NCCL as two. What is fastest at a size is marked; mii/parallel/peers.py holds the bounds that should follow from that.

On CPUs: float32, the mean time of a call on the slowest rank, and the processors' time of all ranks together.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import graph_seconds
from mii.benchmark.limits import describe_machine
from mii.benchmark.report import versions, write_json
from mii.ops.norm import norm, norm_arguments
from mii.parallel import peers
from mii.parallel.pages import open_pages
from mii.parallel.peers import MOST_BYTES, PeerMemory, open_peers

KIB = 1024
SIZES = [KIB << power for power in range(2, 17)]  # 4 KiB to 64 MiB
CPU_SIZES = SIZES[:11]  # to 4 MiB
COLUMNS = ("nccl", "one", "two", "norm nccl", "norm one", "norm two")


def slowest(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds of the slowest rank."""
    dist.barrier(device_ids=[device.index])
    seconds = torch.tensor(graph_seconds([call]), device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return 1e6 * seconds.item()


def ours(call: Callable[[], bool], device: torch.device) -> float | None:
    """None where it does not go."""
    return slowest(call, device) if call() else None


def measure(memory: PeerMemory, num_bytes: int, width: int, device: torch.device) -> dict[str, Any]:
    rows = max(1, num_bytes // (2 * width))
    width = min(width, num_bytes // 2)
    x, residual, out = (torch.zeros(rows, width, dtype=torch.bfloat16, device=device) for _ in range(3))
    weight = torch.ones(width, dtype=torch.bfloat16, device=device)
    arguments = norm_arguments(out, x, weight, eps=1e-5, residual=residual)
    assert arguments is not None

    def library_norm() -> None:
        dist.all_reduce(x)
        norm(out, x, weight, eps=1e-5, residual=residual)

    times = (
        slowest(lambda: dist.all_reduce(x), device),
        ours(lambda: memory.all_reduce(x, 1), device),
        ours(lambda: memory.all_reduce(x, 2), device),
        slowest(library_norm, device),
        ours(lambda: memory.all_reduce_norm(arguments, 1), device),
        ours(lambda: memory.all_reduce_norm(arguments, 2), device),
    )
    return {"bytes": num_bytes, "rows": rows, "us": dict(zip(COLUMNS, times, strict=True))}


def line(result: dict[str, Any]) -> str:
    times = result["us"]
    best = [min(times[name] or 1e9 for name in group) for group in (COLUMNS[:3], COLUMNS[3:])]
    cells = []
    for index, name in enumerate(COLUMNS):
        value = times[name]
        mark = "*" if value == best[index // 3] else " "
        cells.append(f"{value:9.1f}{mark}" if value is not None else f"{'-':>9} ")
    return f"{result['bytes'] // KIB:6d} KiB {result['rows']:5d} rows {' '.join(cells)}"


def gather(memory: PeerMemory, device: torch.device) -> dict[str, float]:
    """What the sampler of 64 greedy rows exchanges."""
    x = torch.zeros(3, 64, dtype=torch.int32, device=device)
    out = torch.zeros(memory.size, 3, 64, dtype=torch.int32, device=device)
    library = slowest(lambda: dist.all_gather_into_tensor(out, x), device)
    return {"nccl": library, "ours": slowest(lambda: memory.all_gather(out, x), device)}


def run(memory: PeerMemory, width: int, device: torch.device) -> dict[str, Any]:
    """All figures; rank 0 prints them."""
    results = []
    for num_bytes in SIZES:
        results.append(measure(memory, num_bytes, width, device))
        if memory.rank == 0:
            print(line(results[-1]), flush=True)
    gathered = gather(memory, device)
    if memory.rank == 0:
        print(f"gather of 64 rows: nccl {gathered['nccl']:.1f}, ours {gathered['ours']:.1f}; lost {memory.lost()}")
    return {"results": results, "gather": gathered}


def run_gpus(store: Any, rank: int, size: int, width: int) -> dict[str, Any] | None:
    """None where the GPUs do not see each other's memory."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    peers.ASKED_FOR = True
    memory = open_peers(store, rank, size, device, True)
    if memory is None:
        return None
    if rank == 0:
        print(f"{size} ranks, {torch.cuda.get_device_name()}, us; fastest marked")
        print(" " * 22 + " ".join(f"{name:>9} " for name in COLUMNS))
    figures = run(memory, width, device)
    memory.close(store)
    return figures


def run_cpus(store: Any, rank: int, size: int) -> dict[str, Any] | None:
    """None where the ranks cannot share memory."""
    torch.set_num_threads(1)
    pages = open_pages(store, rank, size, True)
    if pages is None:
        return None
    results = []
    for num_bytes in CPU_SIZES:
        x = torch.zeros(num_bytes // 4)
        result: dict[str, Any] = {"bytes": num_bytes}
        calls: tuple[tuple[str, Callable[..., object]], ...] = (("gloo", dist.all_reduce), ("ours", pages.all_reduce))
        for name, call in calls:
            result[name] = dict(zip(("us", "cpu us"), _host_times(partial(call, x)), strict=True))
        results.append(result)
        if rank == 0:
            words = [
                f"{name} {result[name]['us']:8.0f} ({result[name]['cpu us']:.0f} cpu)" for name in ("gloo", "ours")
            ]
            print(f"{num_bytes // KIB:6d} KiB  {'  '.join(words)}", flush=True)
    return {"results": results}


def _host_times(call: Callable[[], object], times: int = 100) -> tuple[float, float]:
    for _ in range(5):
        call()
    wall, own = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    wall, own = time.perf_counter() - wall, time.process_time() - own
    slowest, together = torch.tensor([wall]), torch.tensor([own])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(together)
    return 1e6 * slowest.item() / times, 1e6 * together.item() / times


def write(figures: dict[str, Any], size: int, device: torch.device, path: Path) -> None:
    about: dict[str, Any] = {
        "benchmark": "all-reduce",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    about |= {"machine": describe_machine(device), "versions": versions(), "ranks": size, "most_bytes": MOST_BYTES}
    write_json(about | figures, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Times sums over the ranks of one host.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, default=8192, help="elements of a row that is normed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda, device = args.device == "cuda", torch.device(args.device)
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    store = PrefixStore("peers", _get_default_store())
    figures = run_gpus(store, rank, size, args.width) if cuda else run_cpus(store, rank, size)
    if figures is not None and rank == 0 and args.json is not None:
        write(figures, size, device, args.json)
    dist.destroy_process_group()
    return int(figures is None)


if __name__ == "__main__":
    sys.exit(main())
