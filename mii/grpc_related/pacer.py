"""Streams send in turn, and no more messages a second in all than a front can afford.

A message costs the front, the load balancer and the client some tens of microseconds each, however little is in it.
While few streams run, each token is sent as it comes. When tokens come faster than messages may go, streams wait in a
queue, and what comes for a waiting stream joins its next message; so a stream waits `streams / rate` seconds at most.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

__all__ = ["MESSAGES_AT_ONCE", "MESSAGES_A_SECOND", "Pacer"]

MESSAGES_A_SECOND = 5_000
"""Of all streams of a process together. A reader in Python takes some 6,000 a second on one core; what it has not taken
would wait in the connection, where nothing is merged."""
MESSAGES_AT_ONCE = 256
# Shorter waits are not worth a timer.
_TICK_SECONDS = 0.002


class Pacer:
    """Calls back those who ask, in their order.

    Args:
        rate: calls a second in the long run.
        burst: calls that may come at once after a pause.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._interval = 1 / rate
        self._slack = burst / rate
        self._next_at = 0.0
        self._waiting: deque[Callable[[], object]] = deque()

    def ask(self, go: Callable[[], object]) -> None:
        """Calls `go` soon: now, where nobody waits and the rate allows it."""
        if not self._waiting and self._take_turn():
            go()
            return
        self._waiting.append(go)
        if len(self._waiting) == 1:
            self._rest()

    def _take_turn(self) -> bool:
        now = time.monotonic()
        if self._next_at > now:
            return False
        self._next_at = max(self._next_at, now - self._slack) + self._interval
        return True

    def _serve(self) -> None:
        while self._waiting and self._take_turn():
            self._waiting.popleft()()
        if self._waiting:
            self._rest()

    def _rest(self) -> None:
        self._loop.call_later(max(self._next_at - time.monotonic(), _TICK_SECONDS), self._serve)
