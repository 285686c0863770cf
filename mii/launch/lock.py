"""Locks between processes: files that the kernel unlocks when their holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["acquire", "is_held", "locked", "wait_released"]

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
    return not wait_released(path, 0.0)


def wait_released(path: Path, seconds: float) -> bool:
    """Waits until no process holds the lock; False when one still does after this time.

    A holder that removes the file and lives on is waited for too, if it does so during the wait.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    deadline = time.monotonic() + seconds
    try:
        while not _is_released(descriptor):
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True
    finally:
        os.close(descriptor)


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
