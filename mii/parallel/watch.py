"""Whether the other ranks are still there, for a rank that waits for them within a step, where it cannot look itself.

What adds up over ranks of several GPUs or hosts (NCCL) waits without end for a rank that has died or stands still. So
each rank has a thread beside its steps, and a connection of that thread's own: rank 0 to all others, these to rank 0.
Rank 0 sends a beat to everyone, twice a second. A rank is lost where beats do not reach it any more, which ZeroMQ finds
out by heartbeats of its own, and rank 0 where none has come for a while. Time is counted in the thread's own turns, so
that nobody is lost when the whole machine stands still.

A rank that finds another one lost begins no further step. Where it is within one and stays there, its process ends:
nothing else would ever end the wait.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import zmq

from mii.errors import GenerationError
from mii.logging import logger

__all__ = ["FirstWatch", "OtherWatch"]

_TURN_MS = 500
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 1000, 4000
_UNREACHED_TURNS = 4  # a connection may come back
_UNHEARD_TURNS = 14
_MERCY_TURNS = 4  # what adds up may find out by itself and say more
_LINGER_MS = 1000
_BEAT, _FAREWELL = b"beat", b"farewell"


def _end_process(reason: str) -> None:
    logger.error("this rank ends: %s", reason)
    os._exit(1)


class _Watch:
    """A thread that looks at a socket in turns, until it is closed."""

    def __init__(self, kind: int, end: Callable[[str], object]) -> None:
        self._context = zmq.Context(io_threads=1)
        self._context.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket: zmq.Socket[bytes] = self._context.socket(kind)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        self._end = end
        self._lost = ""
        self._steps = 0  # odd: within one
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mii-watch", daemon=True)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surrounds a step of this rank.

        Raises:
            GenerationError: another rank is lost.
        """
        if self._lost:
            raise GenerationError(self._lost)
        self._steps += 1
        try:
            yield
        finally:
            self._steps += 1

    def close(self) -> None:
        """Ends the watch."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._lost = self._turn()
                if self._lost:
                    self._wait_in_vain()
                    return
            self._leave()
        finally:
            self._context.destroy()

    def _wait_in_vain(self) -> None:
        """Ends the process once a step does not end: the one that it is in, or one that began at this moment."""
        step, turns = self._steps, 0
        while turns < _MERCY_TURNS:
            if self._closing.wait(_TURN_MS / 1000):
                return
            turns = turns + 1 if step % 2 and step == self._steps else 0
            step = self._steps
        self._end(self._lost)

    def _turn(self) -> str:
        """Looks for half a second; returns who is lost, if anybody is."""
        raise NotImplementedError

    def _leave(self) -> None:
        """What is said when the watch is closed."""


class FirstWatch(_Watch):
    """Rank 0's.

    Args:
        size: ranks of the group.
        address: where to listen; ``tcp://host:*`` takes any port.
        end: what ends the process, given the reason.
    """

    def __init__(self, size: int, address: str, end: Callable[[str], object] = _end_process) -> None:
        super().__init__(zmq.ROUTER, end)
        self._size = size
        self._unreached = dict.fromkeys(range(1, size), -1)  # turns in a row; -1: it has not come yet
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where the others find it."""
        self._thread.start()

    def _turn(self) -> str:
        for rank, turns in self._unreached.items():
            if self._send(rank, _BEAT):
                self._unreached[rank] = 0
            elif turns >= 0:
                self._unreached[rank] = turns + 1
                if turns + 1 > _UNREACHED_TURNS:
                    return f"rank {rank} of {self._size} is gone or stands still"
        self._closing.wait(_TURN_MS / 1000)
        return ""

    def _leave(self) -> None:
        for rank in self._unreached:
            self._send(rank, _FAREWELL)

    def _send(self, rank: int, message: bytes) -> bool:
        try:
            self._socket.send_multipart((_name(rank), message), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True


class OtherWatch(_Watch):
    """Another rank's.

    Args:
        rank: which one.
        size: ranks of the group.
        address: where rank 0 listens.
        end: what ends the process, given the reason.
    """

    def __init__(self, rank: int, size: int, address: str, end: Callable[[str], object] = _end_process) -> None:
        super().__init__(zmq.DEALER, end)
        self._size = size
        self._unheard = 0
        self._socket.setsockopt(zmq.IDENTITY, _name(rank))
        self._socket.connect(address)
        self._thread.start()

    def _turn(self) -> str:
        if not self._socket.poll(_TURN_MS):
            self._unheard += 1
            return f"rank 0 of {self._size} is gone or stands still" if self._unheard > _UNHEARD_TURNS else ""
        self._unheard = 0
        with suppress(zmq.Again):
            while True:
                if self._socket.recv(zmq.NOBLOCK) == _FAREWELL:
                    self._closing.set()  # rank 0 is done, and says so to the steps too
        return ""


def _name(rank: int) -> bytes:
    return f"rank-{rank}".encode()
