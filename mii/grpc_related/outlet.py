"""Messages that go out in the moment in which there is something to say, with no task to wake in between.

A task that sleeps until there is something costs a turn of the event loop, and more in a process that was idle, where
nothing of it is in the processor's cache. So sending begins in a plain callback; a task goes on with it where it has to
wait for room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any

__all__ = ["Outlet", "Rest", "begin"]


class Rest:
    """What is left of something awaitable that has begun and waits for a future.

    Args:
        steps: of the awaitable.
        future: that it waits for.
    """

    def __init__(self, steps: Generator[Any, Any, None], future: Any) -> None:
        self._steps, self._future = steps, future

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._future
        except BaseException:
            self._steps.close()
            raise
        yield from self._steps

    def close(self) -> None:
        """Gives it up."""
        self._steps.close()


def begin(work: Awaitable[None]) -> Rest | None:
    """Runs until it waits for something. Returns the rest of it; None: there is none."""
    steps = work.__await__()
    try:
        return Rest(steps, next(steps))
    except StopIteration:
        return None


class Outlet:
    """One message after the other, each made when there is room for it. Made within a running event loop.

    Args:
        collect: what is to be said, in one message; may be nothing.
        send: writes a message, and returns when there is room for the next one.
        over: whether nothing more will ever be said.
    """

    def __init__(
        self, collect: Callable[[], bytes], send: Callable[[bytes], Awaitable[None]], over: Callable[[], bool]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._collect, self._send, self._over = collect, send, over
        self._due = self._full = False
        self._waiting: Rest | None = None
        self._failure: BaseException | None = None
        self._turn = asyncio.Event()

    def wake(self) -> None:
        """There is something to say, or it may be over."""
        if not self._due and not self._full:
            self._due = True
            self._loop.call_soon(self._advance)

    def flush(self) -> None:
        """Says now what `wake` was called for, and not when the loop comes round to it."""
        if self._due:
            self._advance()

    async def run(self) -> None:
        """Sends until it is over.

        Raises:
            Exception: what `collect` or `send` raise.
        """
        try:
            while self._full or not self._over():
                await self._turn.wait()
                self._turn.clear()
                if self._failure is not None:
                    raise self._failure
                await self._find_room()
        finally:
            self._full = True
            if self._waiting is not None:
                self._waiting.close()

    async def _find_room(self) -> None:
        """Lets the message that waits go out, and what comes after it."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            await waiting
            self._full = False
            self._advance()

    def _advance(self) -> None:
        self._due = False
        try:
            while not self._full and (message := self._collect()):
                self._waiting = begin(self._send(message))
                self._full = self._waiting is not None
        except (Exception, asyncio.CancelledError) as error:  # gRPC raises the latter where a server has been stopped
            self._failure = error
        if self._full or self._failure is not None or self._over():
            self._turn.set()
