"""Runs the kernel benchmarks: every benchmarks/kernels_*.py, whose run(device) gives one dict a case.

    python benchmarks/run_kernels.py [--device cuda] [--only NAME ...] [--json FILE]

A case has "kernel", "case" (text), "seconds", and "bytes" (moved) or "flops" (done) or both; what else it has is kept
in the JSON file. The table shows each case's rate and its share of what this machine reaches (mii.benchmark.limits).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mii.benchmark.limits import MachineLimits, describe_machine, measure_limits
from mii.benchmark.report import versions, write_json

FOLDER = Path(__file__).resolve().parent
PREFIX = "kernels_"


def names() -> list[str]:
    """The kernel families that have a benchmark."""
    return sorted(path.stem.removeprefix(PREFIX) for path in FOLDER.glob(f"{PREFIX}*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{PREFIX}{name}", FOLDER / f"{PREFIX}{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def with_share(case: dict[str, Any], limits: MachineLimits) -> dict[str, Any]:
    """The case with the share of the limit that binds it: the least time for its bytes or its FLOPs over its time."""
    least = max(case.get("bytes", 0) / limits.bandwidth, case.get("flops", 0) / limits.matmul)
    return case | {"share": least / case["seconds"]}


def line(case: dict[str, Any]) -> str:
    rates = []
    if "bytes" in case:
        rates.append(f"{case['bytes'] / case['seconds'] / 1e9:9,.1f} GB/s")
    if "flops" in case:
        rates.append(f"{case['flops'] / case['seconds'] / 1e12:8,.2f} TFLOP/s")
    name, microseconds = f"{case['kernel']:<16} {case['case']:<44}", 1e6 * case["seconds"]
    return f"{name} {microseconds:10,.1f} us {case['share']:5.0%}  {' '.join(rates)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs the kernel benchmarks.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=names(), metavar="NAME", help=f"of {', '.join(names())}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    limits = measure_limits(device, torch.bfloat16)
    print(f"limits: {limits.bandwidth / 1e9:,.1f} GB/s, {limits.matmul / 1e12:,.2f} TFLOP/s ({limits.how})")
    selection = f" --only {' '.join(args.only)}" if args.only else ""
    cases = []
    for name in args.only or names():
        for case in load(name).run(device):
            cases.append(with_share(case, limits))
            print(line(cases[-1]), flush=True)
    if args.json is not None:
        report = {
            "benchmark": "kernels",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": f"python benchmarks/run_kernels.py --device {args.device}{selection}",
            "machine": describe_machine(device),
            "versions": versions(),
            "limits": {
                "bandwidth_bytes_per_s": limits.bandwidth,
                "matmul_flop_per_s": limits.matmul,
                "how": limits.how,
            },
            "cases": cases,
        }
        write_json(report, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
