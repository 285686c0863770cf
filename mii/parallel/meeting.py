"""What ranks tell one another before they work together, through torch's key-value store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def meet(store: Any, rank: int, size: int, name: str, mine: str) -> list[str]:
    """What every rank says under a name, once all have said it."""
    store.set(f"{name}-{rank}", mine)
    return [store.get(f"{name}-{other}").decode() for other in range(size)]


def this_machine() -> str:
    """Machines are told apart by their kernels, and containers on one by the namespaces that matter here."""
    namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid", "ipc")]
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {namespaces}"
