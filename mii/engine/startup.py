"""Where the time of a start goes: named phases from the start of the process to a ready engine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mii.logging import logger


def process_age() -> float:
    """Seconds since this process was started, by the kernel's books."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started


class StartReport:
    """The phases of one start, in order.

        report = StartReport()
        with report.phase("weights"):
            ...
            report.note("16.1 GB")
        report.log()

    The first phase is what came before: the process, its imports, and whatever a script did until now.
    """

    def __init__(self) -> None:
        self.phases: list[tuple[str, float, str]] = [("before: process, imports", process_age(), "")]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block; `note` adds words to it."""
        begin = time.perf_counter()
        self.phases.append((name, 0.0, ""))
        index = len(self.phases) - 1
        try:
            yield
        finally:
            self.phases[index] = (name, time.perf_counter() - begin, self.phases[index][2])

    def note(self, words: str) -> None:
        """Words beside the phase that began last."""
        name, seconds, _ = self.phases[-1]
        self.phases[-1] = (name, seconds, words)

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds, _ in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """Seconds by phase, for a JSON file."""
        return {name: round(seconds, 3) for name, seconds, _ in self.phases} | {"all": round(self.seconds, 3)}

    def lines(self) -> list[str]:
        """The table."""
        rows = [*self.phases, ("all", self.seconds, "")]
        return [f"{name:<26} {seconds:7.2f} s  {words}".rstrip() for name, seconds, words in rows]

    def log(self) -> None:
        logger.info("where the start's time went:\n  %s", "\n  ".join(self.lines()))
