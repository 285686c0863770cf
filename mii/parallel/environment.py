"""What a launcher (`deepspeed`, `torchrun` and others) tells each process of a script."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from mii.errors import LauncherError

_HOLD_SECONDS = 5.0  # more than a launcher takes to end everybody once the first rank has ended


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that a launcher started.

    Args:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on this machine.
        local_size: how many are on this machine.
        address: `host` and `port` where rank 0 can be met.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: tuple[str, int]


def read_launch() -> Launch:
    """From RANK, WORLD_SIZE and the others.

    Raises:
        LauncherError: one of them is missing or is no number in its range.
    """
    size = _number("WORLD_SIZE", 1, 1 << 20)
    rank = _number("RANK", 0, size - 1)
    local_size = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    return Launch(
        rank,
        size,
        _number("LOCAL_RANK", 0, size - 1, rank),
        _number(local_size, 1, size, size),
        (_text("MASTER_ADDR"), _number("MASTER_PORT", 1, 65535)),
    )


def _text(name: str) -> str:
    value = os.environ.get(name)
    if value:
        return value
    raise LauncherError(
        f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')} and {name} is not set, so no launcher started this process: "
        "start the script with deepspeed or torchrun, or unset WORLD_SIZE"
    )


def _number(name: str, low: int, high: int, default: int | None = None) -> int:
    if default is not None and not os.environ.get(name):
        return default
    text = _text(name)
    if not text.isdigit() or not low <= int(text) <= high:
        raise LauncherError(f"the environment variable {name} is {text!r}; a number from {low} to {high} is needed")
    return int(text)


_E = TypeVar("_E", bound=BaseException)


def told_by_first(error: _E) -> _E:
    """An error that every rank raises and rank 0 prints: elsewhere, where nobody catches it, it ends the process in
    silence, and only after rank 0 has had time to print it (a launcher ends all when the first one ends).
    """
    if os.environ.get("RANK", "0") not in ("", "0"):
        _quiet.add(id(error))
        _kept.append(error)
        if not isinstance(sys.excepthook, _QuietHook):
            sys.excepthook = _QuietHook(sys.excepthook)
    return error


_quiet: set[int] = set()
_kept: list[BaseException] = []  # so that no other object gets its id

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


class _QuietHook:
    def __init__(self, before: _Hook) -> None:
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if id(error) in _quiet:
            time.sleep(_HOLD_SECONDS)
        else:
            self._before(kind, error, traceback)
