"""Sums over the GPUs of one host, ours beside NCCL's, in microseconds by size.

    torchrun --nproc_per_node 4 benchmarks/run_all_reduce.py [--json FILE] [--width 8192]

Each figure is the median time of one call within a CUDA graph of 32, as in a step; of the ranks the slowest counts.
`norm`: the sum, the addition to the residual and the RMSNorm of rows of `--width` bfloat16, as one kernel, and with
NCCL as two. What is fastest at a size is marked; mii/parallel/peers.py holds the bounds that should follow from that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone
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
from mii.parallel.peers import MOST_BYTES, PeerMemory, open_peers

KIB = 1024
SIZES = [KIB << power for power in range(2, 13)]  # 4 KiB to 4 MiB
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


def write(figures: dict[str, Any], size: int, device: torch.device, path: Path) -> None:
    about = {"benchmark": "all-reduce", "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    about |= {"machine": describe_machine(device), "versions": versions(), "ranks": size, "most_bytes": MOST_BYTES}
    write_json(about | figures, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Times sums over the GPUs of one host.")
    parser.add_argument("--width", type=int, default=8192, help="elements of a row that is normed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    peers.ASKED_FOR = True
    store = PrefixStore("peers", _get_default_store())
    memory = open_peers(store, rank, size, device, True)
    if memory is None:
        return 1
    if rank == 0:
        print(f"{size} ranks, {torch.cuda.get_device_name()}, us; fastest marked")
        print(" " * 22 + " ".join(f"{name:>9} " for name in COLUMNS))
    figures = run(memory, args.width, device)
    if rank == 0 and args.json is not None:
        write(figures, size, device, args.json)
    memory.close(store)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
