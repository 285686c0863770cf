"""Those who talk to the supervisor of a deployment over a socket: whoever started it, and whoever asks for a change."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from mii.launch.state import Event, Part

__all__ = ["Door", "Watcher"]

_OUTBOX_BYTES = 65536
_READ_BYTES = 65536
_LONGEST_LINE = 16 << 20


class Watcher:
    """The socket to one of them. Events wait here while that process does not read.

    Args:
        connection: the socket.
        selector: calls what is registered with it when the socket is readable, or writable again.
        on_gone: called once when the other end is closed.
        on_line: called with each line that comes from there.
    """

    def __init__(
        self,
        connection: socket.socket,
        selector: selectors.BaseSelector,
        on_gone: Callable[[Watcher], object],
        on_line: Callable[[Watcher, bytes], object] = lambda watcher, line: None,
    ) -> None:
        self.gone = False
        self._connection, self._selector = connection, selector
        self._on_gone, self._on_line = on_gone, on_line
        self._outbox, self._inbox = b"", b""
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, self._on_event)

    def tell(self, event: Event) -> None:
        """Sends an event; the progress of a part is dropped when too much is waiting."""
        if not self.gone and not (isinstance(event, Part) and len(self._outbox) > _OUTBOX_BYTES):
            self._outbox += msgspec.json.encode(event) + b"\n"
            self._flush()

    def close(self, seconds: float) -> None:
        """Sends what is waiting, which may take so long, and lets go."""
        with contextlib.suppress(OSError, KeyError):
            self._selector.unregister(self._connection)
        with contextlib.suppress(OSError):
            self._connection.settimeout(seconds)
            self._connection.sendall(self._outbox)
        self._connection.close()
        self.gone, self._outbox = True, b""

    def _on_event(self) -> None:
        self._listen()
        if not self.gone:
            self._flush()
        if self.gone:
            self._selector.unregister(self._connection)
            self._on_gone(self)

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                data = self._connection.recv(_READ_BYTES)
            except ConnectionResetError:
                data = b""
            self._inbox += data
            self.gone = not data or len(self._inbox) > _LONGEST_LINE
        *lines, self._inbox = self._inbox.split(b"\n")
        for line in lines:
            self._on_line(self, line)

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while self._outbox:
                    self._outbox = self._outbox[self._connection.send(self._outbox) :]
            except (BrokenPipeError, ConnectionResetError):
                self._outbox = b""  # the selector says that it is gone
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0)
        self._selector.modify(self._connection, wanted, self._on_event)


class Door:
    """Where a running deployment is asked for changes: a unix socket, for its owner only.

    Args:
        path: of the socket.
        selector: see `Watcher`.
        on_line: called with who asks and a line of what is asked.
    """

    def __init__(
        self, path: Path, selector: selectors.BaseSelector, on_line: Callable[[Watcher, bytes], object]
    ) -> None:
        self._selector, self._on_line = selector, on_line
        self._watchers: set[Watcher] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(mask)
        self._listener.listen()
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def close(self, seconds: float) -> None:
        """Lets nobody in any more, and lets go of those who are there; see `Watcher.close`."""
        self._selector.unregister(self._listener)
        self._listener.close()
        for watcher in self._watchers:
            watcher.close(seconds)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            connection, _ = self._listener.accept()
            self._watchers.add(Watcher(connection, self._selector, self._on_gone, self._on_line))

    def _on_gone(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)
        watcher.close(0.0)
