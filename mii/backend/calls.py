"""Calls of a deployment: tried again where that is safe, ended at once when their caller goes away.

A call is tried again when the server was not there (UNAVAILABLE) and nothing of the answer had come, for a few seconds,
unless the server says that it has tried everything itself.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import closing
from functools import partial
from numbers import Real
from typing import Any

import grpc
import grpc.aio

from mii.backend.apart import Handle, apart
from mii.errors import MIIError, RequestTimeoutError
from mii.grpc_related.statuses import KIND, NO_RETRY, EndedCall, error_of

__all__ = ["Attempts", "stream", "stream_async", "unary", "unary_async"]

_PAUSES = (0.1, 0.3, 1.0, 2.0, 2.0)  # seconds before the second, third, ... attempt
Metadata = tuple[tuple[str, str], ...]


class Attempts:
    """How long a call may take and how often it may be tried.

    Args:
        timeout: seconds for all attempts together; None: any time.
        diagnose: says why the server cannot be there, where trying again is in vain; else nothing.
        where: the server, for messages.

    Raises:
        ValueError: the timeout is not above 0.
    """

    def __init__(self, timeout: float | None, diagnose: Callable[[], str | None], where: str) -> None:
        if timeout is not None and not _is_positive(timeout):
            raise ValueError(f"timeout is {timeout!r}; give a number of seconds above 0, or None for no limit")
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._timeout = timeout
        self._pauses = iter(_PAUSES)
        self._diagnose, self._where = diagnose, where

    def remaining(self) -> float | None:
        """Seconds that the next attempt has.

        Raises:
            RequestTimeoutError: none.
        """
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise RequestTimeoutError(f"{self._where} was not there within timeout={self._timeout:g} s")
        return left

    def pause(self, ended: EndedCall, started: bool) -> float:
        """Seconds to wait before the next attempt.

        Args:
            ended: the last one.
            started: whether a part of the answer had come.

        Raises:
            MIIError: there is none; this is what the call comes to.
        """
        code = ended.code()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and self._timeout is not None:
            raise error_of(ended, f"the answer was not complete within timeout={self._timeout:g} s") from None
        if code is not grpc.StatusCode.UNAVAILABLE:
            raise error_of(ended) from None
        metadata = dict(ended.trailing_metadata() or ())
        if started or metadata.get(NO_RETRY[0]) == NO_RETRY[1]:
            raise self._unavailable(ended, metadata) from None
        reason = self._diagnose()
        if reason is not None:
            raise error_of(ended, reason) from None
        seconds = next(self._pauses, None)
        if seconds is None or (self._deadline is not None and time.monotonic() + seconds >= self._deadline):
            raise self._unavailable(ended, metadata) from None
        return seconds

    def _unavailable(self, ended: EndedCall, metadata: dict[str, Any]) -> MIIError:
        if KIND in metadata:  # in the server's own words
            return error_of(ended)
        return error_of(ended, f"{self._where} does not answer: {ended.details()}")


def _is_positive(timeout: Any) -> bool:
    """Whether it is a number of seconds; one of an array library counts, text does not."""
    return isinstance(timeout, Real) and float(timeout) > 0


def unary(method: Any, request: Any, attempts: Attempts, metadata: Metadata = ()) -> Any:
    """The reply of a call, in any thread. An exception while it waits, such as Ctrl-C, cancels it.

    Raises:
        MIIError: what the call came to.
    """
    with closing(_run(partial(method.future, request, metadata=metadata), _result, attempts)) as replies:
        (reply,) = replies
    return reply


def stream(method: Any, request: Any, attempts: Attempts, metadata: Metadata = ()) -> Generator[Any, None, None]:
    """The replies of a call as they come, in any thread. Whatever ends the iteration cancels the call.

    Raises:
        MIIError: what the call came to.
    """
    return _run(partial(method, request, metadata=metadata), iter, attempts)


def _run(
    start: Callable[..., Any], read: Callable[[Any], Iterable[Any]], attempts: Attempts
) -> Generator[Any, None, None]:
    handle = Handle()
    replies = _attempt(start, read, attempts, handle)
    return apart(replies, handle) if threading.current_thread() is threading.main_thread() else replies


def _attempt(
    start: Callable[..., Any], read: Callable[[Any], Iterable[Any]], attempts: Attempts, handle: Handle
) -> Generator[Any, None, None]:
    while True:
        failure = yield from _once(start(timeout=attempts.remaining()), read, handle)
        if failure is None:
            return
        time.sleep(attempts.pause(*failure))


def _once(
    call: Any, read: Callable[[Any], Iterable[Any]], handle: Handle
) -> Generator[Any, None, tuple[grpc.aio.AioRpcError, bool] | None]:
    """The replies of a call; returns how it failed, if it did, and whether something had come.

    The call's destructor takes a lock of gRPC's, so it has to run here and not in whichever thread drops the last
    reference: none is left behind, not even by the traceback of an error, which is the call itself.
    """
    started = False
    handle.hold(call)
    try:
        for reply in read(call):
            started = True
            yield reply
        return None
    except (grpc.RpcError, grpc.FutureCancelledError) as error:
        error.__traceback__ = None
        return _failure(call), started
    finally:
        call.cancel()
        handle.drop()


def _failure(call: Any) -> grpc.aio.AioRpcError:
    """How a call ended, without the call."""
    metadata = grpc.aio.Metadata(*(call.trailing_metadata() or ()))
    return grpc.aio.AioRpcError(call.code(), grpc.aio.Metadata(), metadata, details=call.details())


def _result(call: Any) -> Iterable[Any]:
    yield call.result()


async def unary_async(method: Any, request: Any, attempts: Attempts, metadata: Metadata = ()) -> Any:
    """As `unary`, in an event loop."""
    while True:
        call = method(request, timeout=attempts.remaining(), metadata=metadata)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            seconds = attempts.pause(error, started=False)
        finally:
            call.cancel()
        await asyncio.sleep(seconds)


async def stream_async(
    method: Any, request: Any, attempts: Attempts, metadata: Metadata = ()
) -> AsyncGenerator[Any, None]:
    """As `stream`, in an event loop."""
    started = False
    while True:
        call = method(request, timeout=attempts.remaining(), metadata=metadata)
        try:
            while (reply := await call.read()) is not grpc.aio.EOF:
                started = True
                yield reply
            return
        except grpc.aio.AioRpcError as error:
            seconds = attempts.pause(error, started)
        finally:
            call.cancel()
        await asyncio.sleep(seconds)
