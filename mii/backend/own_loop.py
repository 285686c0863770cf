"""An event loop that a client keeps for callers who have none, see `MIIClient.asyncio_loop`."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from mii.backend import channels

__all__ = ["OwnLoop"]


class OwnLoop:
    """Made when it is asked for; whoever has calls in it runs it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """The loop, which is this thread's current one from now on: gRPC asks for that."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        return self._loop

    def close(self) -> None:
        """Closes it and its connections; nothing happens where there is none, or while somebody runs it."""
        loop, self._loop = self._loop, None
        if loop is None or loop.is_running():
            return
        with contextlib.suppress(RuntimeError):  # there is no current one
            if asyncio.get_event_loop() is loop:
                asyncio.set_event_loop(None)
        closing = threading.Thread(target=channels.close_loop, args=(loop,))  # another one may run in this thread
        closing.start()
        closing.join()
