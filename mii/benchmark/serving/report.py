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

__all__ = ["describe_host", "make_report", "print_table"]

_MILLI = 1e3


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
    from rich.console import Console
    from rich.table import Table

    table = Table("load", title="times in ms: mean / p50 / p99; effective: requests/s as fast as agreed")
    rates = [agreed["agreed_tokens_per_s"] for agreed in points[0]["effective"]]
    effective = [f"at {rate:g} tok/s" for rate in rates]
    for column in ("req/s", "answer tok/s", "first token", "per token", "request", *effective, "errors"):
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(*_row(point))
    Console(highlight=False).print(table)


def _row(point: Mapping[str, Any]) -> list[str]:
    times = [_times(point[name]) for name in ("first_token_s", "token_s", "request_s")]
    effective = [_number(agreed["requests_per_s"]) for agreed in point["effective"]]
    speeds = [_number(point[name]) for name in ("requests_per_s", "answer_tokens_per_s")]
    return [point["load"]["name"], *speeds, *times, *effective, str(point["errors"]["count"])]


def _times(values: Mapping[str, float]) -> str:
    return " / ".join(_number(_MILLI * values[name]) for name in ("mean", "p50", "p99")) if values else "-"


def _number(value: float) -> str:
    """Three figures or whole thousands: more would be noise."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
