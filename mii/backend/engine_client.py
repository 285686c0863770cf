"""The front's side of the connection to its engine process.

Every connection is a new socket, so nothing of an earlier life reaches a later engine. An engine is lost when its
socket closes (at once when it is killed), when it says that it died, or when it is silent for too long while it has
work; then whoever listens is told, and the client waits for the next engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol

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
    ToEngine,
    ToFront,
    decode_to_front,
    encode,
)
from mii.batching.data_classes import EngineRequest, StepOutput
from mii.errors import ServerUnavailableError
from mii.logging import logger

__all__ = ["EngineClient", "EngineListener"]

_RECONNECT_MS = 50
_LONGEST_CHECK_SECONDS = 1.0
# Messages that are taken in before other work of the event loop gets its turn.
_MESSAGES_A_TURN = 16


class _Connection:
    """One life of the connection: a socket, and a monitor that tells when it is closed.

    Args:
        context: of the sockets.
        address: where the engine listens, or will.
        take: gets every message; a sentence that it returns ends the connection.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, take: Callable[[bytes], str | None]):
        self._loop, self._take = asyncio.get_running_loop(), take
        self.ended: asyncio.Future[str] = self._loop.create_future()
        """Why the connection ended."""
        self._socket = context.socket(zmq.DEALER)
        # No bound: what is under way is bounded by what the front admits, and the loop never waits in a send.
        self._socket.set_hwm(0)
        for option in (zmq.RECONNECT_IVL, zmq.RECONNECT_IVL_MAX):
            self._socket.setsockopt(option, _RECONNECT_MS)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._closed = has_come(self._monitor)  # its descriptor says nothing before somebody has looked
        self._descriptors = [socket.fileno() for socket in (self._socket, self._monitor)]
        for descriptor, react in zip(self._descriptors, (self._read, self._note_end), strict=True):
            self._loop.add_reader(descriptor, react)
        self._socket.connect(address)

    def send(self, message: bytes) -> None:
        """Never waits."""
        if not self.ended.done():
            self._socket.send(message, zmq.NOBLOCK)
            # A send may swallow the sign that something came.
            self._loop.call_soon(self._read)

    def close(self) -> None:
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        if not self.ended.done():
            self.ended.set_result("the connection was closed")

    def _read(self) -> None:
        if self.ended.done():
            return
        for _ in range(_MESSAGES_A_TURN):
            if not has_come(self._socket):
                if self._closed:
                    self.ended.set_result("the engine process has ended")
                return
            reason = self._take(self._socket.recv(zmq.NOBLOCK))
            if reason is not None:
                self.ended.set_result(reason)
                return
        self._loop.call_soon(self._read)

    def _note_end(self) -> None:
        """The socket has closed, perhaps. What came before that is still to be read."""
        self._closed = self._closed or has_come(self._monitor)
        self._read()


class EngineListener(Protocol):
    """Who is told what an engine says. Called in the event loop; must return soon."""

    def on_ready(self, info: EngineInfo) -> None:
        """An engine is there and takes requests."""

    def on_outputs(self, outputs: StepOutput) -> None:
        """New tokens; also of requests that were aborted a moment ago."""

    def on_refused(self, refused: Refused) -> None:
        """A request can never run."""

    def on_lost(self, reason: str) -> None:
        """The engine is gone, and every request that it had."""


class EngineClient:
    """Connects to an engine process, again whenever a new one comes up.

    Args:
        address: ``ipc://`` address where the engine listens, or will.
        listener: told what the engine says.
        silence_seconds: an engine that has work and says nothing for so long counts as dead, and is killed.
    """

    def __init__(self, address: str, listener: EngineListener, *, silence_seconds: float) -> None:
        self._address, self._listener = address, listener
        self._silence_seconds = silence_seconds
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._open: set[int] = set()
        self._heard_at = 0.0
        self._questions: dict[int, asyncio.Future[EngineStats]] = {}
        self._question_ids = itertools.count(1)
        self.info: EngineInfo | None = None
        """Of the engine that is there now; None while there is none."""
        self.stats = EngineStats()
        """As the engine's last message had them."""
        self.lives = 0
        """How many engines have been there."""
        self.reason = "the engine has not come up yet"
        """Why there is no engine, as far as known."""

    @property
    def outstanding(self) -> int:
        """Requests that the engine has and that have not ended."""
        return len(self._open)

    def start(self) -> None:
        """Begins to connect, in the running event loop."""
        self._task = asyncio.create_task(self._run(), name="engine-client")

    async def close(self) -> None:
        """Lets go of the engine, which then aborts what it has."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._context.destroy(linger=0)

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Gives requests to the engine.

        Raises:
            ServerUnavailableError: there is none now.
        """
        if self.info is None:
            raise ServerUnavailableError(f"{self.reason}; try again soon")
        if not self._open:
            self._heard_at = time.monotonic()
        self._open.update(request.uid for request in requests)
        self._send(Add(list(requests)))

    def abort(self, uids: Sequence[int]) -> None:
        """Tells the engine that nobody wants these requests any more; those that it does not have are fine."""
        known = [uid for uid in uids if uid in self._open]
        if known:
            self._open.difference_update(known)
            self._send(Abort(known))

    async def ask(self, timeout: float) -> EngineStats:
        """How the engine is, from the engine itself.

        Args:
            timeout: seconds to wait for its answer, which comes between two steps.

        Raises:
            ServerUnavailableError: there is no engine, or it is lost meanwhile.
            TimeoutError: it did not answer in time.
        """
        if self.info is None:
            raise ServerUnavailableError(self.reason)
        number = next(self._question_ids)
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        self._send(Ask(number))
        try:
            return await asyncio.wait_for(answer, timeout)
        except asyncio.TimeoutError:
            raise TimeoutError(f"the engine did not answer within {timeout:g} s") from None
        finally:
            self._questions.pop(number, None)

    async def check(self, timeout: float) -> str:
        """Why the engine is not well, from the engine itself; empty: it is.

        One that has work may be in a long step and answers later; whether it is hung, `silence_seconds` says.

        Args:
            timeout: seconds to wait for its answer.
        """
        try:
            await self.ask(timeout)
        except ServerUnavailableError as error:
            return str(error)
        except TimeoutError as error:
            return "" if self._open else str(error)
        return ""

    def _send(self, message: ToEngine) -> None:
        if self._connection is not None:
            self._connection.send(encode(message))

    async def _run(self) -> None:
        while True:
            self._connection = _Connection(self._context, self._address, self._take)
            try:
                self._send(Hello())
                reason = await self._end_of(self._connection)
            finally:
                self._connection.close()
                self._connection = None
            self._lose(reason)

    async def _end_of(self, connection: _Connection) -> str:
        """Returns why the engine is lost, once it is."""
        period = min(_LONGEST_CHECK_SECONDS, self._silence_seconds / 4)
        while not connection.ended.done():
            await asyncio.wait([connection.ended], timeout=period)
            silent = time.monotonic() - self._heard_at
            if not connection.ended.done() and self._open and silent >= self._silence_seconds:
                self._kill()
                return f"the engine has said nothing for {silent:.0f} s while it had work, so it was ended"
        return connection.ended.result()

    def _take(self, message: bytes) -> str | None:
        """Passes a message on; returns why the engine died if it says so."""
        self._heard_at = time.monotonic()
        try:
            said = decode_to_front(message)
        except msgspec.DecodeError as error:
            return f"the engine speaks another version: {error}"
        return self._react(said)

    def _react(self, said: ToFront) -> str | None:
        if isinstance(said, Step):
            self.stats = said.stats
            for output in said.outputs.others:
                if output.finish_reason is not None:
                    self._open.discard(output.uid)
            if said.outputs:
                self._listener.on_outputs(said.outputs)
        elif isinstance(said, Refused):
            self._open.discard(said.uid)
            self._listener.on_refused(said)
        elif isinstance(said, Answer):
            self._answer(said)
        elif isinstance(said, Ready):
            self.info, self.reason = said.info, ""
            self.lives += 1
            self._listener.on_ready(said.info)
        elif isinstance(said, Died):
            return f"the engine failed: {said.error}"
        return None

    def _answer(self, said: Answer) -> None:
        self.stats = said.stats
        question = self._questions.get(said.id)
        if question is not None and not question.done():
            question.set_result(said.stats)

    def _kill(self) -> None:
        """Ends a hung engine, so that its supervisor starts a new one."""
        if self.info is not None and self.info.pid > 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.info.pid, signal.SIGKILL)

    def _lose(self, reason: str) -> None:
        was_there = self.info is not None
        self.info, self.reason = None, reason
        self.stats = EngineStats()
        self._open.clear()
        for question in self._questions.values():
            if not question.done():
                question.set_exception(ServerUnavailableError(reason))
        if was_there:
            logger.error("the engine is lost: %s", reason)
            self._listener.on_lost(reason)
