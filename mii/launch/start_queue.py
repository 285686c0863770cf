"""Who of a deployment's processes is started when."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from mii.launch.child import Child
from mii.launch.state import BALANCER

__all__ = ["StartQueue"]

# A process that starts for longer than this waits for something that it does not tell of.
_BUSY_SECONDS = 2.0


class StartQueue:
    """Engines are started at once, the others as there are cores for them.

    Each of the others takes half a second of processor time and more to import what it needs. On a machine with few
    cores all at once would take it from the engines, which are longest in coming up; one after the other they are done
    on a core that the engines leave free.

    Args:
        children: all processes.
        cores: that they run on.
    """

    def __init__(self, children: Sequence[Child], cores: int) -> None:
        engines = [child for child in children if child.spec.group]
        others = [child for child in children if not child.spec.group]
        # The load balancer finds the fronts there; else it would look for them again in a moment of its own choice.
        self._others = deque(sorted(others, key=lambda child: child.spec.role == BALANCER))
        self._due = engines
        self._room = max(1, cores - len(engines))
        self._started: dict[Child, float] = {}

    def __bool__(self) -> bool:
        """Whether some are still to be started."""
        return bool(self._due or self._others)

    @property
    def wake_at(self) -> float:
        """When the next one is to be started though nobody says a word, by `time.monotonic`."""
        return min((since + _BUSY_SECONDS for since in self._busy().values()), default=time.monotonic())

    def take(self) -> list[Child]:
        """Those to start now."""
        due, self._due = self._due, []
        room = self._room - len(self._busy())
        due += [self._others.popleft() for _ in range(min(room, len(self._others)))]
        self._started |= dict.fromkeys((child for child in due if not child.spec.group), time.monotonic())
        return due

    def _busy(self) -> dict[Child, float]:
        """Those that still compute, and since when they run."""
        latest = time.monotonic() - _BUSY_SECONDS
        return {child: since for child, since in self._started.items() if child.busy and since > latest}
