"""Compares the results of `mii bench offline --json` with the least that is accepted (minimum.json).

    python benchmarks/check.py results.json ...

Exits with 1 when a figure falls short, or when no entry of minimum.json belongs to a result: a check of nothing would
pass for ever.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

MINIMUM = Path(__file__).with_name("minimum.json")


def matches(entry: dict[str, Any], report: dict[str, Any]) -> bool:
    """Whether an entry is about this machine, model and number format, with all layers and default options."""
    device = report["machine"].get("gpu", "cpu")
    model = report["model"]
    return (
        any(name in device for name in entry["devices"])
        and entry["shape"] == model["name"]
        and entry["dtype"] == model["dtype"]
        and entry["layers"] == model["layers"]
    )


def compare(entry: dict[str, Any], report: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(figure, what was measured against what is accepted, good enough) for each figure that both have."""
    lines = []
    for row in report["rows"]:
        accepted = entry["rows"].get(row["name"])
        if accepted is None:
            continue
        measured = {"value": row["value"], "share": row["share"], **row["details"]}[accepted["of"]]
        bound, higher = accepted["accepted"], accepted["higher_is_better"]
        good = measured >= bound if higher else measured <= bound
        what = f"{accepted['of']} {measured:,.4g}, accepted {'at least' if higher else 'at most'} {bound:,.4g}"
        lines.append((row["name"], what, good))
    return lines


def check(path: Path, entries: list[dict[str, Any]]) -> bool:
    """Prints the comparison of one result; True when everything is good enough."""
    report = json.loads(path.read_text())
    lines = [line for entry in entries if matches(entry, report) for line in compare(entry, report)]
    print(f"{path}: {report['machine'].get('gpu', report['machine']['cpu'])}, {report['model']['name']}")
    for name, what, good in lines:
        print(f"  {'ok   ' if good else 'SHORT'} {name}: {what}")
    if not lines:
        print("  nothing in minimum.json belongs to this machine, model and these figures")
    return bool(lines) and all(good for _, _, good in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares benchmark results with the least that is accepted.")
    parser.add_argument("results", nargs="+", type=Path, help="files that `mii bench offline --json` wrote")
    parser.add_argument("--minimum", type=Path, default=MINIMUM)
    args = parser.parse_args(arguments)
    entries = json.loads(args.minimum.read_text())
    results = [check(path, entries) for path in args.results]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
