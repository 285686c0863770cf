"""Shows how far a deployment that starts is: a bar for each process on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

from mii.launch.process import Message, Progress, Ready
from mii.launch.state import Part

__all__ = ["StartupView", "startup_view"]

_LINE_SECONDS = 2.0  # between two plain lines about one stage
_KILO = 1000.0


class StartupView(Protocol):
    """Takes in what the processes say while they start."""

    def show(self, part: Part) -> None:
        """One process has said something."""

    def note(self, text: str) -> None:
        """A line for the user."""

    def close(self) -> None:
        """The start is over, one way or the other."""


def startup_view(enabled: bool | None, stream: TextIO | None = None) -> StartupView:
    """The view that suits `stream` (standard error): nothing when `enabled` is False."""
    stream = sys.stderr if stream is None else stream
    if enabled is False:
        return _NoView()
    return _BarView(stream) if stream.isatty() else _LineView(stream)


def describe(message: Message) -> str:
    """What a process says, as words: ``weights 120 MB of 270 MB``."""
    if isinstance(message, Ready):
        ports = ", ".join(f"{name} on port {port}" for name, port in message.ports.items())
        return f"ready: {ports}" if ports else "ready"
    if isinstance(message, Progress):
        if message.total:
            return f"{message.stage} {_amount(message.done, message.unit)} of {_amount(message.total, message.unit)}"
        return message.stage
    return ""


def _amount(value: float, unit: str) -> str:
    if unit != "B":
        return f"{value:g} {unit}".rstrip()
    for prefix in ("B", "kB", "MB"):
        if value < _KILO:
            return f"{value:.0f} {prefix}"
        value /= _KILO
    return f"{value:.1f} GB"


class _NoView:
    def show(self, part: Part) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class _LineView:
    """A line when a process enters a stage, ends it, or has been in it for a while."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._start = stream, time.monotonic()
        self._last: dict[str, tuple[str, float]] = {}

    def show(self, part: Part) -> None:
        text = describe(part.message)
        stage = part.message.stage if isinstance(part.message, Progress) else text
        last_stage, last_time = self._last.get(part.role, ("", 0.0))
        now = time.monotonic()
        if text and (stage != last_stage or now >= last_time + _LINE_SECONDS):
            self._last[part.role] = (stage, now)
            self.note(f"{part.role}: {text}")

    def note(self, text: str) -> None:
        print(f"mii {time.monotonic() - self._start:6.1f} s  {text}", file=self._stream, flush=True)

    def close(self) -> None: ...


class _BarView:
    """One row for each process, redrawn in place and taken away at the end."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Rows

        self._rows = Rows(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.fields[role]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=Console(file=stream),
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self._rows.start()

    def show(self, part: Part) -> None:
        if part.role not in self._tasks:
            self._tasks[part.role] = self._rows.add_task("", total=None, role=part.role)
        task, text = self._tasks[part.role], describe(part.message)
        if isinstance(part.message, Ready):
            self._rows.update(task, description=text, total=1, completed=1)
        elif isinstance(part.message, Progress):
            total = part.message.total or None
            self._rows.update(
                task, description=text, total=total, completed=min(part.message.done, (total or 1) * 0.999)
            )

    def note(self, text: str) -> None:
        self._rows.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._rows.stop()
