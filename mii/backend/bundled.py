"""Calls that share one gRPC stream with all others of their event loop, see `mii.grpc_related.trunk`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

import grpc
import grpc.aio

from mii.backend.calls import Attempts
from mii.grpc_related.answers import Answers, Piece
from mii.grpc_related.trunk import Bundle, ended_call

__all__ = ["BundledCall"]

_OURS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)


class BundledCall:
    """A call whose answers are streamed, each by a stream of its own in a bundle. Ends with its `async with` block.

    Args:
        bundle: carries it.
        requests: a MultiStringRequest for each of its prompts.
        attempts: how long it may take and how often it may be tried.
        name: for logs.

    Example:
        async with BundledCall(bundle, [request], attempts) as call:
            while pieces := await call.take():
                print(pieces)
    """

    def __init__(self, bundle: Bundle, requests: Sequence[bytes], attempts: Attempts, name: str = "") -> None:
        self._bundle, self._requests, self._attempts, self._name = bundle, requests, attempts, name
        self._answers = Answers(len(requests))
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def take(self) -> list[Piece]:
        """What has come since the last time, once something has; nothing once everything was taken.

        Raises:
            MIIError: what the call came to.
        """
        while True:
            if not self._tasks:
                self._start()
            try:
                return await self._answers.take()
            except grpc.aio.AioRpcError as error:
                seconds = self._attempts.pause(error, self._answers.started)
            self._stop()
            await asyncio.sleep(seconds)

    def take_now(self) -> list[Piece]:
        """What has come since the last time; may be nothing. Goes with `listen`.

        Raises:
            MIIError: see `take`.
        """
        try:
            return self._answers.take_now()
        except grpc.aio.AioRpcError as error:
            self._attempts.pause(error, started=True)
            raise

    @property
    def over(self) -> bool:
        """Whether everything was taken."""
        return self._answers.over

    def listen(self, tell: Callable[[], object] | None, offer: Callable[[Sequence[Piece]], bool] | None = None) -> None:
        """As `Answers.listen`, for after the first `take`."""
        self._answers.listen(tell, offer)

    async def __aenter__(self) -> BundledCall:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends what of it still runs, wherever it is."""
        tasks = self._tasks
        self._stop()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self) -> None:
        seconds = self._attempts.remaining()
        self._answers = Answers(len(self._requests))
        runs = (self._run(place, request, self._answers) for place, request in enumerate(self._requests))
        self._tasks = [asyncio.ensure_future(run) for run in runs]
        if seconds is not None:
            late = ended_call(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
            self._timer = asyncio.get_running_loop().call_later(seconds, self._answers.fail, late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        self._tasks, self._timer = [], None

    async def _run(self, place: int, request: bytes, answers: Answers) -> None:
        try:
            await self._bundle.run(request, self._name, answers.push)
        except grpc.aio.AioRpcError as error:
            # One of several may fail alone, where that is our fault and some of the call has come.
            if len(self._requests) == 1 or error.code() not in _OURS or not answers.started:
                answers.fail(error)
            else:
                answers.push([Piece(index=place, finish_reason="error", error=error.details() or "no reason given")])
        finally:
            answers.end_part()
