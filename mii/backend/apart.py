"""Iterating in another thread, for the main thread.

gRPC's channels have locks of Python's own. An exception that a signal raises in the main thread, Ctrl-C above all, can
come between taking such a lock and the block that gives it back, and then every later call over that channel hangs; or
it comes in a destructor, and is lost. So the main thread does not touch gRPC, nor hold a call that has ended: another
one does, and the two talk through queues that no signal can break. Nor does it wait until that thread runs, as
`threading.Thread.start` would with locks of the same kind.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["Handle", "apart"]

_AHEAD = 8  # items that may wait for the main thread
_T = TypeVar("_T")


class Handle:
    """Lets one thread end the call that another one makes."""

    def __init__(self) -> None:
        self._call: Any = None
        self.ended = False

    def hold(self, call: Any) -> None:
        """From the thread that makes the call: this is it."""
        self._call = call
        if self.ended:
            call.cancel()

    def drop(self) -> None:
        """From the thread that makes the call: it has ended."""
        self._call = None

    def end(self) -> None:
        """From any other thread: cancels it, now or as soon as there is one."""
        self.ended = True
        call = self._call
        if call is not None:
            call.cancel()


def apart(items: Generator[_T, None, None], handle: Handle) -> Generator[_T, None, None]:
    """Yields what `items` yields, which runs in a thread of its own, a few items ahead at most.

    Args:
        items: is run to its end, or until the result is closed.
        handle: ends what `items` waits for.

    Raises:
        BaseException: what `items` raises.
    """
    results: SimpleQueue[tuple[bool, Any]] = SimpleQueue()  # whether it is an item, and the item or the error or None
    wanted: SimpleQueue[bool] = SimpleQueue()
    for _ in range(_AHEAD):
        wanted.put(True)
    more = True
    try:
        _start("mii-call", _work, items, results, wanted)
        while more:
            more, result = results.get()
            if more:
                yield result
                wanted.put(True)
    finally:
        if more:
            wanted.put(False)
            with contextlib.suppress(RuntimeError):  # no thread can be started while the interpreter ends
                _start("mii-cancel", handle.end)
    if result is not None:
        raise result


def _start(name: str, work: Callable[..., object], *arguments: Any) -> None:
    """Has a thread started by another one, which waits for it in place of this."""
    thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
    _thread.start_new_thread(thread.start, ())


def _work(items: Generator[_T, None, None], results: SimpleQueue[tuple[bool, Any]], wanted: SimpleQueue[bool]) -> None:
    end: BaseException | None = None
    try:
        while wanted.get():
            item = next(items, results)
            if item is results:
                break
            results.put((True, item))
    except BaseException as error:
        end = error
    try:
        items.close()
    finally:
        results.put((False, end))
