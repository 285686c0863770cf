"""What the host and the device did in each step, and when nothing ran: a profile that can be read and drawn.

    timeline = Timeline(engine.runner.device)
    engine.record(timeline)
    ...                                   # steps
    engine.record(None)
    timeline.write("steps.json")          # Perfetto and chrome://tracing draw it

The host's step has five parts: it plans, fills the step's inputs, launches it, waits for the tokens of the step before,
and sorts those. The device's time runs from a step's first copy to the copy of its tokens. Where it begins
after the step before has ended, the device had nothing to do: a gap. On a CPU the launch is the step and there
are no gaps.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

PARTS = ("plan", "fill", "launch", "wait", "read")


@dataclass(slots=True)
class StepTimes:
    """One turn of the host, in seconds since the timeline began, and the device's events of the step it launched."""

    begin: float
    ends: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    device: list[torch.cuda.Event] = field(default_factory=list)

    def part(self, name: str) -> tuple[float, float]:
        """Begin and end of a part; parts that did not happen take no time."""
        before = self.begin
        for each in PARTS[: PARTS.index(name)]:
            before = self.ends.get(each, before)
        return before, self.ends.get(name, before)

    @property
    def host(self) -> float:
        """Seconds of the host's own work: all but the waiting."""
        return sum(end - begin for begin, end in map(self.part, PARTS)) - (self.part("wait")[1] - self.part("wait")[0])


class Timeline:
    """Records steps.

    Args:
        device: Where they run.
        most: Steps that are kept; those that follow are not recorded.
    """

    def __init__(self, device: torch.device, most: int = 10_000) -> None:
        self._most, self._cuda = most, device.type == "cuda"
        self._steps: list[StepTimes] = []
        self._open: StepTimes | None = None
        self._zero = time.perf_counter()
        self._first: torch.cuda.Event | None = None
        if self._cuda:
            torch.cuda.synchronize(device)
            self._zero = time.perf_counter()
            self._first = self._event()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    # -- told by the engine -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._open = StepTimes(time.perf_counter() - self._zero) if len(self._steps) < self._most else None

    def done(self, part: str) -> None:
        """The host is through with a part of the step."""
        if self._open is not None:
            self._open.ends[part] = time.perf_counter() - self._zero

    def launches(self, tokens: int, sequences: int) -> None:
        """The inputs of a step of this size are about to be copied to the device."""
        if self._open is not None:
            self._open.tokens, self._open.sequences = tokens, sequences
            self._mark(self._open)

    def launched(self) -> None:
        """The device has been told everything about the step."""
        if self._open is not None:
            self._mark(self._open)

    def _mark(self, step: StepTimes) -> None:
        if self._cuda:
            step.device.append(self._event())

    def end(self) -> None:
        """The step is over for the host."""
        if self._open is not None:
            self._steps.append(self._open)
        self._open = None

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def _device_times(self) -> list[tuple[float, float] | None]:
        """Begin and end of every step on the device, on the host's clock."""
        if self._first is None:
            return [None] * len(self._steps)
        torch.cuda.synchronize()
        times: list[tuple[float, float] | None] = []
        for step in self._steps:
            found = [1e-3 * self._first.elapsed_time(event) for event in step.device]
            times.append((found[0], found[1]) if len(found) == 2 else None)
        return times

    def rows(self) -> list[dict[str, Any]]:
        """Every step: its size, the host's milliseconds by part, the device's, and the gap before it."""
        rows = []
        before: float | None = None
        for step, device in zip(self._steps, self._device_times(), strict=True):
            row: dict[str, Any] = {"tokens": step.tokens, "sequences": step.sequences, "host_ms": 1e3 * step.host}
            row |= {f"{name}_ms": 1e3 * (step.part(name)[1] - step.part(name)[0]) for name in PARTS}
            if device is not None:
                row["device_ms"] = 1e3 * (device[1] - device[0])
                row["gap_ms"] = 0.0 if before is None else 1e3 * max(0.0, device[0] - before)
                before = device[1]
            rows.append(row)
        return rows

    def summary(self) -> dict[str, float]:
        """Medians over the steps, and the share of the device's time in which it had nothing to do."""
        rows = self.rows()
        found = {"steps": float(len(rows))}
        for name in ("host_ms", *(f"{part}_ms" for part in PARTS), "device_ms", "gap_ms"):
            values = [row[name] for row in rows if name in row]
            if values:
                found[name] = median(values)
        busy, idle = (sum(row.get(name, 0.0) for row in rows) for name in ("device_ms", "gap_ms"))
        return found | ({"idle_share": idle / (busy + idle)} if busy else {})

    def write(self, path: str | Path) -> None:
        """A JSON file of all steps: "summary", "steps", and "traceEvents" to be drawn."""
        events = [
            {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "step"}},
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "host"}},
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": 1, "args": {"name": "device"}},
        ]
        for step, device in zip(self._steps, self._device_times(), strict=True):
            events += [_bar(name, 0, *step.part(name)) for name in PARTS]
            if device is not None:
                events.append(_bar(f"{step.tokens} tokens", 1, *device))
        report = {"summary": self.summary(), "steps": self.rows(), "traceEvents": events}
        Path(path).write_text(json.dumps(report) + "\n")


def _bar(name: str, thread: int, begin: float, end: float) -> dict[str, Any]:
    """A bar of the drawing; its unit is the microsecond."""
    return {"name": name, "ph": "X", "pid": 0, "tid": thread, "ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
