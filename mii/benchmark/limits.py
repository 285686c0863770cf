"""What this machine reaches at best: the rate at which it streams memory and the rate at which it multiplies matrices.

Every figure of a benchmark is given as a share of these, measured in the same process just before, since two machines
of one name, or one machine at two times, may differ.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mii.benchmark.machine import cpu_name


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Measured rates.

    Args:
        bandwidth: Bytes/s. On a GPU a copy, bytes read plus bytes written; on a CPU a read with all threads.
        matmul: FLOP/s of a large square product in the benchmark's number format.
        how: What was run, in words.
    """

    bandwidth: float
    matmul: float
    how: str

    def as_dict(self) -> dict[str, float | str]:
        """For a JSON file, with the units in the names."""
        return {"bandwidth_bytes_per_s": self.bandwidth, "matmul_flop_per_s": self.matmul, "how": self.how}


def measure_limits(device: torch.device, dtype: torch.dtype) -> MachineLimits:
    """Runs both measurements; takes a second or two and gives back the memory it used."""
    return _cuda_limits(device, dtype) if device.type == "cuda" else _cpu_limits(dtype)


def _cuda_limits(device: torch.device, dtype: torch.dtype) -> MachineLimits:
    size = 8192
    copied, multiplied = _cuda_copy(1 << 30, device), _cuda_matmul(size, device, dtype)
    torch.cuda.empty_cache()
    how = f"copy of 1 GiB; {dtype} product of {size} cubed; medians of 20"
    return MachineLimits(copied, multiplied, how)


def _cuda_copy(count: int, device: torch.device) -> float:
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _cuda_seconds(lambda: target.copy_(source), device)


def _cuda_matmul(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / _cuda_seconds(lambda: torch.mm(a, b, out=product), device)


def _cuda_seconds(run: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Median seconds of one call, by events, after a warm-up that brings the clocks up."""
    stream = torch.cuda.current_stream(device)
    times = []
    for turn in range(2 * rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        if turn >= rounds:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _cpu_limits(dtype: torch.dtype) -> MachineLimits:
    buffer = torch.ones(128 << 20)  # 512 MiB: more than a last-level cache
    read = _cpu_seconds(lambda: torch.dot(buffer, buffer))
    size = 2048
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    matmul = _cpu_seconds(lambda: torch.mm(a, b, out=product))
    bandwidth = buffer.numel() * buffer.element_size() / read
    threads = torch.get_num_threads()
    how = f"reading 512 MiB; {dtype} product of {size} cubed; {threads} threads, best of 7"
    return MachineLimits(bandwidth, 2 * size**3 / matmul, how)


def _cpu_seconds(run: Callable[[], object], rounds: int = 7) -> float:
    """The best of some rounds: a limit is what the machine can do when nobody disturbs it."""
    run()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Name, size and driver of what the benchmark ran on; the load is that of the last minute."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda or "",
            "driver": _driver(),
        }
    return found


def _driver() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, text=True, capture_output=True)
    return answer.stdout.split("\n", 1)[0].strip() or "unknown"
