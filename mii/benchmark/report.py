"""What a benchmark leaves behind: a table for people and a JSON file for checks and for the README's numbers."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mii.benchmark.limits import MachineLimits
    from mii.benchmark.rows import Row

_PACKAGES = ("mii", "torch", "transformers", "tokenizers", "numpy", "grpcio", "uvicorn")


def versions() -> dict[str, str]:
    """Of everything that has a share in the figures."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def _commit() -> str:
    """The commit of the checkout that this file lies in, marked where files differ from it; empty outside of one."""
    folder = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, text=True, capture_output=True).stdout.strip()
    except OSError:
        return ""


def make_report(
    *,
    model: Mapping[str, Any],
    machine: Mapping[str, Any],
    limits: MachineLimits,
    memory: Mapping[str, int],
    rows: list[Row],
) -> dict[str, Any]:
    """Everything that is needed to read the figures later, as plain JSON types."""
    return {
        "benchmark": "offline",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["mii", *sys.argv[1:]]),
        "machine": dict(machine),
        "versions": versions(),
        "model": dict(model),
        "limits": limits.as_dict(),
        "memory_bytes": dict(memory),
        "rows": [row.as_dict() for row in rows],
    }


def write_json(report: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def print_report(report: Mapping[str, Any]) -> None:
    """The table, for a terminal or a file."""
    from rich.console import Console
    from rich.table import Table

    machine, model, limits = report["machine"], report["model"], report["limits"]
    console = Console(highlight=False)
    ranks = f"{model['tensor_parallel']} ranks, limits of one, " if model["tensor_parallel"] > 1 else ""
    console.print(f"{machine.get('gpu', machine['cpu'])}, {ranks}{model['name']}, {model['dtype']}")
    console.print(
        f"limits: {limits['bandwidth_bytes_per_s'] / 1e9:,.1f} GB/s, {limits['matmul_flop_per_s'] / 1e12:,.2f} TFLOP/s "
        f"({limits['how']})"
    )
    _print_memory(console, report["memory_bytes"])
    table = Table("figure", "unit")
    for title in ("measured", "limit", "share"):
        table.add_column(title, justify="right")
    for row in report["rows"]:
        limit, share = row["limit"], row["share"]
        shown = ("", "") if limit is None else (_number(limit), f"{share:.0%}")
        table.add_row(row["name"], row["unit"], _number(row["value"]), *shown)
    console.print(table)


def _print_memory(console: Console, ledger: dict[str, int]) -> None:
    """The ledger, and on a GPU what is neither weights nor cache nor graphs."""
    from mii.benchmark.memory import beside_the_model

    console.print("memory: " + ", ".join(f"{use} {size / 1e9:.2f} GB" for use, size in ledger.items()))
    if "driver" in ledger:
        console.print(f"        beside weights, cache and graphs {beside_the_model(ledger) / 1e9:.2f} GB")


def _number(value: float) -> str:
    """Three figures or whole thousands: more would be noise."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
