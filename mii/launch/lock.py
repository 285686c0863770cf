"""Locks between processes: files that the kernel unlocks when their holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["acquire", "is_held", "locked", "watched"]

_LOOK_SECONDS = 0.02


def acquire(path: Path) -> int:
    """Waits for the lock, and returns the file descriptor that holds it: in this process and in those that inherit it.

    The file is made where it is missing. A holder that is done may remove it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its last holder has removed it


def is_held(path: Path) -> bool:
    """Whether a process holds the lock; nothing is made or kept."""
    with watched(path) as released:
        return not released(0.0)


@contextlib.contextmanager
def watched(path: Path) -> Iterator[Callable[[float], bool]]:
    """A function that waits until no process holds the lock, for some seconds at most; False when one still does then.

    A holder that removes the file and lives on is waited for too, if it does so after this has begun: so begin it
    before the holder is told to end.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield lambda seconds: True
        return
    try:
        yield lambda seconds: _wait_released(descriptor, seconds)
    finally:
        os.close(descriptor)


def _wait_released(descriptor: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not _is_released(descriptor):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _is_released(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock for a moment and leaves no file."""
    descriptor = acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
