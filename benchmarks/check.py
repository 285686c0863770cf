"""Compares results with the least that is accepted (minimum.json): of whole mixes and of single kernels.

    python benchmarks/check.py results.json kernels.json ...

The files are those of `mii bench offline --json`, `run_kernels.py --json` and `run_all_reduce.py --json`. Exits with 1
when a figure falls short, or when no entry of minimum.json belongs to a result: a check of nothing would pass for ever.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MINIMUM = Path(__file__).with_name("minimum.json")


def device_of(report: dict[str, Any]) -> str:
    """The GPU's name, or the processor's where there was none."""
    return str(report["machine"].get("gpu", report["machine"]["cpu"]))


def matches(entry: dict[str, Any], report: dict[str, Any]) -> bool:
    """Whether an entry is about this machine and about what was measured: kernels, sums of as many ranks, or this model
    and number format with all layers.
    """
    if not any(name in device_of(report) for name in entry["devices"]):
        return False
    if "cases" in entry:
        return bool(report["benchmark"] == "kernels")
    if "sums" in entry:
        return bool(report["benchmark"] == "all-reduce" and report["ranks"] == entry["ranks"])
    if report["benchmark"] != "offline":
        return False
    model = report["model"]
    same = all(entry[name] == model[name] for name in ("dtype", "layers"))
    ranks = entry.get("tensor_parallel", 1) == model.get("tensor_parallel", 1)
    return bool(same and ranks and entry["shape"] == model["name"])


def compare(entry: dict[str, Any], report: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(figure, what was measured against what is accepted, good enough) for each figure that both have."""
    lines = []
    for name, figures in figures_of(report):
        accepted = (entry.get("rows") or entry.get("cases") or entry["sums"]).get(name)
        if accepted is None:
            continue
        measured = figures[accepted["of"]]
        bound, higher = accepted["accepted"], accepted["higher_is_better"]
        good = measured >= bound if higher else measured <= bound
        what = f"{accepted['of']} {measured:,.4g}, accepted {'at least' if higher else 'at most'} {bound:,.4g}"
        lines.append((name, what, good))
    return lines


def figures_of(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row or case of a result under its name in minimum.json, with all figures it has."""
    for row in report.get("rows", []):
        yield row["name"], {"value": row["value"], "share": row["share"], **row["details"]}
    for case in report.get("cases", []):
        yield f"{case['kernel']} | {case['case']}", case
    for result in report.get("results", []):
        yield f"sum of {result['bytes']} bytes", result["us"]


def check(path: Path, entries: list[dict[str, Any]]) -> bool:
    """Prints the comparison of one result; True when everything is good enough."""
    report = json.loads(path.read_text())
    lines = [line for entry in entries if matches(entry, report) for line in compare(entry, report)]
    about = report["model"]["name"] if report["benchmark"] == "offline" else report["benchmark"]
    print(f"{path}: {device_of(report)}, {about}")
    for name, what, good in lines:
        print(f"  {'ok   ' if good else 'SHORT'} {name}: {what}")
    if not lines:
        print("  nothing in minimum.json belongs to this machine, model and these figures")
    return bool(lines) and all(good for _, _, good in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares benchmark results with the least that is accepted.")
    parser.add_argument("results", nargs="+", type=Path, help="files that the benchmarks wrote")
    parser.add_argument("--minimum", type=Path, default=MINIMUM)
    args = parser.parse_args(arguments)
    entries = json.loads(args.minimum.read_text())
    results = [check(path, entries) for path in args.results]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
