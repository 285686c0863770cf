"""An engine as a process of its own: takes requests from a front, steps, and sends what each step gave.

The loop does nothing else, so that the engine's next step never waits for text, sockets or JSON. It sleeps in a poll
while there is no work, and looks for messages without waiting once a step while there is.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec
import zmq

from mii.backend.arrivals import has_come
from mii.backend.messages import (
    Abort,
    Add,
    Answer,
    Ask,
    Died,
    EngineInfo,
    EngineStats,
    Hello,
    Ready,
    Refused,
    Step,
    ToFront,
    decode_to_engine,
    encode,
)
from mii.batching.driver import TokenEngine
from mii.errors import GenerationError
from mii.launch.process import Process
from mii.logging import logger

__all__ = ["EngineServer", "ServedEngine"]

# Steps that a front may be behind with reading before the engine waits for it.
_STEPS_AHEAD = 1000
# Messages that are read between two steps at most.
_MESSAGES_A_STEP = 256
# How long the last words to the front may take.
_LINGER_MS = 1000


class ServedEngine(TokenEngine, Protocol):
    """What is served: `mii.engine.Engine`, or a stand-in."""

    def stats(self) -> Any:
        """An object with the counts of `mii.engine.EngineStats`."""


class EngineServer:
    """Serves an engine to one front.

    Args:
        engine: it is the server's alone while it serves.
        info: what the front is told about it.
        process: where to listen, and when to stop.

    Raises:
        zmq.ZMQError: the address cannot be listened on.
    """

    def __init__(self, engine: ServedEngine, info: EngineInfo, process: Process) -> None:
        self._engine, self._info, self._process = engine, info, process
        self._stop_at: float | None = None
        self._front: bytes | None = None
        self._uids: set[int] = set()
        self._steps = 0
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a front that is gone is an error
        self._socket.setsockopt(zmq.SNDHWM, _STEPS_AHEAD)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(process.engine_address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(process.stop_fd, zmq.POLLIN)

    def serve(self) -> None:
        """Returns when a stop was asked for and nothing runs any more, or the time for that is over.

        Raises:
            Exception: the engine failed; the front was told.
        """
        try:
            while not self._stopped():
                self._read()
                if self._engine.has_work:
                    self._step()
        except Exception as error:
            self._send(Died(f"{type(error).__name__}: {error}"))
            raise

    def close(self) -> None:
        """Gives the socket back, after the last words to the front."""
        self._context.destroy(linger=_LINGER_MS)

    def __enter__(self) -> EngineServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stopped(self) -> bool:
        if not self._process.stop_requested:
            return False
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self._process.drain_seconds
        return not self._engine.has_work or time.monotonic() >= self._stop_at

    def _read(self) -> None:
        """Takes in what has come; waits for it if there is no work."""
        if not self._engine.has_work:
            self._poller.poll()
        for _ in range(_MESSAGES_A_STEP):
            if not has_come(self._socket):
                return
            front, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            if len(parts) == 1:
                self._take(front, parts[0])
            else:
                logger.warning("a message of %d parts is of no front of this version, and is ignored", len(parts))

    def _take(self, front: bytes, message: bytes) -> None:
        try:
            wanted = decode_to_engine(message)
        except msgspec.DecodeError as error:
            logger.error("a message of the front is none that this version knows: %s", error)
            return
        if isinstance(wanted, Hello):
            self._greet(front)
        elif front != self._front:
            logger.warning("a message of a front that was replaced is ignored")
        elif isinstance(wanted, Add):
            self._add(wanted)
        elif isinstance(wanted, Abort):
            self._abort(wanted.uids)
        elif isinstance(wanted, Ask):
            self._send(Answer(wanted.id, self._stats()))

    def _greet(self, front: bytes) -> None:
        if front != self._front:
            self._forget_front()
            self._front = front
        self._send(Ready(self._info))

    def _add(self, wanted: Add) -> None:
        for request in wanted.requests:
            try:
                self._engine.add_request(request)
            except ValueError as error:
                self._send(Refused(request.uid, str(error), type(error).__name__))
            except Exception as error:  # whatever it is, it is this request's alone
                logger.exception("request %d could not be taken", request.uid)
                self._send(Refused(request.uid, f"{type(error).__name__}: {error}", GenerationError.__name__))
            else:
                self._uids.add(request.uid)

    def _abort(self, uids: list[int]) -> None:
        for uid in uids:
            self._uids.discard(uid)
            self._engine.abort(uid)

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception:
            # The engine has taken the step back. Once may be chance (memory that another process had); twice is not.
            logger.exception("a step failed and is tried once more")
            outputs = self._engine.step()
        self._steps += 1
        for output in outputs.others:
            if output.finish_reason is not None:
                self._uids.discard(output.uid)
        self._send(Step(outputs, self._stats()))

    def _send(self, message: ToFront) -> None:
        if self._front is None:
            return
        try:
            self._socket.send_multipart((self._front, encode(message)))
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._forget_front()

    def _forget_front(self) -> None:
        """The front is gone, and with it everybody who waited for its requests."""
        if self._front is not None and self._uids:
            logger.warning("the front is gone; its %d requests are aborted", len(self._uids))
        self._front = None
        self._abort(list(self._uids))

    def _stats(self) -> EngineStats:
        counts = self._engine.stats()
        return EngineStats(
            counts.running,
            counts.waiting,
            counts.free_blocks,
            counts.num_blocks,
            counts.preemptions,
            counts.prefix_hit_tokens,
            counts.prefix_queried_tokens,
            self._steps,
        )
