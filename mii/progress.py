"""Progress bars on standard error: shown when it is a terminal, or when asked for. A process of a deployment, which has
no terminal, passes them on instead: `report_progress_to(process.report)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_UNITS = {"B": {"unit": "B", "unit_scale": True, "unit_divisor": 1024}}

# (title, done, total, unit)
Report = Callable[[str, float, float, str], None]
_report: Report | None = None


def report_progress_to(report: Report | None) -> None:
    """From now on every bar of this process is told to `report` and not drawn; None draws them again."""
    global _report
    _report = report


def progress_bar(title: str, total: int, *, unit: str = "it", enabled: bool | None = None) -> Any:
    """A tqdm bar as a context manager. `enabled`: True, False, or None for "when standard error is a terminal"."""
    if _report is not None:
        return _ReportedBar(_report, title, total, unit)
    from tqdm import tqdm

    shown = sys.stderr.isatty() if enabled is None else enabled
    return tqdm(desc=title, total=total, disable=not shown, leave=False, **_UNITS.get(unit, {"unit": unit}))


class _ReportedBar:
    """What users of a bar call on it."""

    def __init__(self, report: Report, title: str, total: int, unit: str) -> None:
        self._report, self._title, self._total, self._unit = report, title, total, unit
        self._done = 0

    def update(self, amount: int = 1) -> None:
        self._done += amount
        self._report(self._title, self._done, self._total, self._unit)

    def close(self) -> None:
        """Nothing is left on a screen."""

    def __enter__(self) -> _ReportedBar:
        self._report(self._title, 0, self._total, self._unit)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
