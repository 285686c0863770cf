"""Keeps Ctrl-C out of an engine step, so that no step is cut in half and the pipeline stays usable after it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class InterruptsDeferred:
    """A context in which Ctrl-C waits for the end; a second one does not wait.

    It concerns the main thread only, because signals reach no other, and only where Ctrl-C has a Python handler.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGINT) if _is_main_thread() else None
        self._frame: FrameType | None = None
        self._pending = False

    def __enter__(self) -> None:
        if callable(self._handler):
            signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again, self._pending, self._frame = self._pending, not self._pending, frame
        if again and callable(self._handler):
            self._handler(number, frame)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if callable(self._handler):
            signal.signal(signal.SIGINT, self._handler)
            if self._pending:
                self._handler(signal.SIGINT, self._frame)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
