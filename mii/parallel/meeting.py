"""What ranks tell one another before they work together, through torch's key-value store."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class DisagreementError(Exception):
    """One of the ranks could not do what all had to, and why."""


def meet(store: Any, rank: int, size: int, name: str, mine: str) -> list[str]:
    """What every rank says under a name, once all have said it."""
    store.set(f"{name}-{rank}", mine)
    return [store.get(f"{name}-{other}").decode() for other in range(size)]


def agree(store: Any, rank: int, size: int, name: str, work: Callable[[], str | None]) -> list[str]:
    """Does something on every rank, and says to all what came of it.

    Args:
        store, rank, size, name: as in `meet`.
        work: returns what to tell the others; its RuntimeError or OSError is what could not be done.

    Raises:
        DisagreementError: it did not go on one of them; raised on all.
    """
    try:
        said = work() or ""
    except (RuntimeError, OSError) as error:
        said = f"!{error}"
    everyone = meet(store, rank, size, name, said)
    for other, words in enumerate(everyone):
        if words.startswith("!"):
            raise DisagreementError(f"rank {other}: {words[1:]}")
    return everyone


def this_machine() -> str:
    """Machines are told apart by their kernels, and containers on one by the namespaces that matter here."""
    namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid", "ipc")]
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {namespaces}"
