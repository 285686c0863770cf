"""Cores for replicas that run on the CPU: each gets its own, so that they do not wait for one another.

Example:
    >>> split_cores([0, 1, 2, 3], 2)
    [[0, 1], [2, 3]]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

__all__ = ["cores_by_place", "split_cores"]

_TOPOLOGY = Path("/sys/devices/system/cpu")


def split_cores(cores: Sequence[int], parts: int) -> list[list[int]]:
    """Deals neighbouring cores to each part, as evenly as they go; with more parts than cores, parts share them.

    Args:
        cores: cores that may be used, neighbours next to each other.
        parts: how many to split them into.
    """
    if parts > len(cores):
        return [[cores[part % len(cores)]] for part in range(parts)]
    bounds = [part * len(cores) // parts for part in range(parts + 1)]
    return [list(cores[first:last]) for first, last in pairwise(bounds)]


def cores_by_place(cores: Sequence[int], topology: Path = _TOPOLOGY) -> list[int]:
    """`cores` sorted by socket and physical core, so that the hardware threads of one core are neighbours.

    Args:
        cores: numbers as the kernel has them.
        topology: the kernel's folder of cores; one that it does not describe keeps its number's place.
    """
    return sorted(cores, key=lambda core: (*_place(topology / f"cpu{core}" / "topology", core), core))


def _place(folder: Path, core: int) -> tuple[int, int]:
    try:
        return (
            int((folder / "physical_package_id").read_text()),
            int((folder / "core_id").read_text()),
        )
    except (OSError, ValueError):
        return (0, core)
