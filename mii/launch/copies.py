"""Several processes for work that one is too slow for: copies of this one, made before it has any threads."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mii.launch.process import PR_SET_PDEATHSIG

__all__ = ["Copies"]

_KILL_SECONDS = 1.0
_READY = b"r"


@dataclass(frozen=True)
class _Copy:
    pid: int
    descriptor: int  # of the process, readable when it has ended
    said: int  # readable when it is ready


class Copies:
    """Copies of this process. The kernel kills them when this one ends, however it does.

    Args:
        works: what each copy does, given a function to call when it is ready; SIGTERM asks it to end.
    """

    def __init__(self, works: Sequence[Callable[[Callable[[], None]], None]]) -> None:
        self._copies = [_fork(work) for work in works]

    async def wait_ready(self) -> None:
        """Sleeps until every copy is ready.

        Raises:
            RuntimeError: one has ended before.
        """
        for copy in self._copies:
            await _readable(copy.said)
            if os.read(copy.said, 1) != _READY:
                raise RuntimeError(f"the copy with pid {copy.pid} has ended before it was ready")

    async def wait_ended(self) -> None:
        """Sleeps until one of the copies has ended; for ever where there are none."""
        waits = [asyncio.ensure_future(_readable(copy.descriptor)) for copy in self._copies]
        if not waits:
            await asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)  # they still listen

    async def stop(self, seconds: float) -> None:
        """Asks all copies to end, and kills those that have not after so many seconds."""
        for copy in self._copies:
            signal.pidfd_send_signal(copy.descriptor, signal.SIGTERM)
        ends = asyncio.gather(*(_readable(copy.descriptor) for copy in self._copies))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ends, seconds + _KILL_SECONDS)
        for copy in self._copies:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(copy.descriptor, signal.SIGKILL)
            os.waitpid(copy.pid, 0)
            os.close(copy.descriptor)
            os.close(copy.said)


def _fork(work: Callable[[Callable[[], None]], None]) -> _Copy:
    parent = os.getpid()
    said, say = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(say)
        return _Copy(pid, os.pidfd_open(pid), said)
    code = 1
    try:
        os.close(said)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() == parent:
            work(lambda: _say(say))
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _say(descriptor: int) -> None:
    os.write(descriptor, _READY)
    os.close(descriptor)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    came = loop.create_future()
    loop.add_reader(descriptor, lambda: None if came.done() else came.set_result(None))
    try:
        await came
    finally:
        loop.remove_reader(descriptor)
