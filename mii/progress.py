"""Progress bars on standard error: shown when it is a terminal, or when asked for."""

from __future__ import annotations

import sys
from typing import Any

_UNITS = {"B": {"unit": "B", "unit_scale": True, "unit_divisor": 1024}}


def progress_bar(title: str, total: int, *, unit: str = "it", enabled: bool | None = None) -> Any:
    """A tqdm bar as a context manager. `enabled`: True, False, or None for "when standard error is a terminal"."""
    from tqdm import tqdm

    shown = sys.stderr.isatty() if enabled is None else enabled
    return tqdm(desc=title, total=total, disable=not shown, leave=False, **_UNITS.get(unit, {"unit": unit}))
