"""What `mii bench serve` leaves behind: a table for people, a JSON file for whoever compares later."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from mii.benchmark.machine import cpu_name
from mii.benchmark.report import versions

__all__ = ["describe_host", "make_report", "print_table", "short_name"]

_WIDTH = 120  # of the table where it goes to a file


def describe_host() -> dict[str, Any]:
    """The machine that the requests came from, with the load of the last minute."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
    }


def make_report(
    *, target: Mapping[str, Any], workload: Mapping[str, Any], machine: Mapping[str, Any], points: Sequence[Any]
) -> dict[str, Any]:
    """Everything that is needed to read the figures later, as plain JSON types. Times are in seconds.

    Args:
        target: what the requests were sent to.
        workload: what was asked.
        machine: see `describe_host`.
        points: the figures of each load.
    """
    return {
        "benchmark": "serve",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["mii", *sys.argv[1:]]),
        "machine": dict(machine),
        "versions": versions(),
        "target": dict(target),
        "workload": dict(workload),
        "points": list(points),
    }


def print_table(points: Sequence[Mapping[str, Any]]) -> None:
    """The main figures of each load."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    rates = [f"at {agreed['agreed_tokens_per_s']:g}/s" for agreed in points[0]["effective"]]
    columns = ("req/s", "tok/s", "first ms", "token ms", "request s", *rates, "errors")
    for column in ("clients" if points[0]["load"]["clients"] else "req/s due", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        table.add_row(*_row(point))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table)
    console.print("tok/s: of the answers; times: p50/p99; at N/s: requests/s that came as fast as agreed")


def short_name(load: Mapping[str, Any]) -> str:
    """A load's number, without its unit."""
    return str(load["clients"]) if load["clients"] else f"{load['rate']:g}"


def _row(point: Mapping[str, Any]) -> list[str]:
    speeds = [_number(point[name]) for name in ("requests_per_s", "answer_tokens_per_s")]
    times = [_times(point[name], 1e3) for name in ("first_token_s", "token_s")]
    effective = [_number(agreed["requests_per_s"]) for agreed in point["effective"]]
    whole = _times(point["request_s"], 1)
    return [short_name(point["load"]), *speeds, *times, whole, *effective, str(point["errors"]["count"])]


def _times(values: Mapping[str, float], unit: float) -> str:
    return "/".join(_number(unit * values[name]) for name in ("p50", "p99")) if values else "-"


def _number(value: float) -> str:
    """Three figures or whole thousands: more would be noise."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
