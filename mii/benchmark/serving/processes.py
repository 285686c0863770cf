"""Processor time of the processes of a deployment on this machine, by role."""

from __future__ import annotations

import os
from pathlib import Path

from mii.config.registry import deployment_folder
from mii.launch.state import read_state, start_ticks

__all__ = ["processor_seconds", "used_since"]

_TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(deployment_name: str) -> dict[str, float]:
    """Seconds that each process has computed so far; empty where the deployment is not on this machine."""
    state = read_state(deployment_folder(deployment_name).state_file)
    if state is None:
        return {}
    running = [(process.role, process.pid, process.start_ticks) for process in state.processes if process.pid]
    return {role: _seconds(pid) for role, pid, ticks in running if start_ticks(pid) == ticks}


def used_since(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """What each process used in between. One that was started again counts from its start."""
    return {
        role: round(used - before.get(role, 0.0) if used >= before.get(role, 0.0) else used, 3)
        for role, used in now.items()
    }


def _seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS
