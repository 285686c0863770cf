"""`MIIAsyncPipeline`: requests are put at any time by any thread, and a thread of the pipeline's own generates."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mii.batching.base import AnswerParts, PipelineBase, stream_pieces
from mii.batching.data_classes import Response, StepOutput
from mii.batching.driver import EngineDriver, Failure, Inbox
from mii.batching.intake import PreparedRequest
from mii.batching.tracker import RequestTracker, TextEvent
from mii.errors import GenerationError, MIIError, PipelineDestroyedError, PromptTypeError


class _Mailbox:
    """One thread's responses: those that came, and the requests that still owe some."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[tuple[int, Response | Exception]] = deque()
        self._open: set[int] = set()

    def expect(self, uid: int) -> None:
        with self._changed:
            self._open.add(uid)

    def put(self, uid: int, item: Response | Exception, last: bool) -> None:
        with self._changed:
            self._items.append((uid, item))
            if last:
                self._open.discard(uid)
            self._changed.notify_all()

    def forget(self, uid: int) -> None:
        with self._changed:
            self._open.discard(uid)
            self._changed.notify_all()

    def get(self, timeout: float | None) -> tuple[int, Response | Exception]:
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or not self._open, timeout):
                raise TimeoutError(f"no response came within {timeout} s")
            if not self._items:
                raise RuntimeError(
                    "get_response() was called, and no request that this thread has put owes a response; a thread gets "
                    "the responses to its own put_request() calls only"
                )
            return self._items.popleft()


@dataclass(eq=False)
class _Entry:
    """A request that has not ended, and where its responses go."""

    prepared: PreparedRequest
    mailbox: _Mailbox
    streams: bool
    parts: AnswerParts = field(init=False)

    def __post_init__(self) -> None:
        self.parts = AnswerParts(self.prepared)

    def take(self, event: TextEvent) -> None:
        """Passes on what the thread that waits shall see of an event."""
        uid = event.uid
        if event.error is not None:
            self.mailbox.put(uid, GenerationError(event.error), last=True)
        elif self.streams:
            pieces = stream_pieces(self.prepared, event)
            for at, piece in enumerate(pieces, 1):
                self.mailbox.put(uid, piece, last=event.finished and at == len(pieces))
        else:
            self.parts.add(event)
            if event.finished and (response := self.parts.response()) is not None:
                self.mailbox.put(uid, response, last=True)


class MIIAsyncPipeline(PipelineBase):
    """Generates for requests that come one by one. Made by `mii.api.async_pipeline`.

    Each thread gets the responses to its own requests, in the order in which they end. The generating thread sleeps
    while there is nothing to do.

    Example:
        >>> pipe.start()  # doctest: +SKIP
        >>> uid = pipe.put_request("DeepSpeed is", {"max_new_tokens": 16})  # doctest: +SKIP
        >>> pipe.get_response()  # doctest: +SKIP
        (1, a deep learning library)
        >>> pipe.shutdown()  # doctest: +SKIP
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tracker = RequestTracker(self._decoder)
        self._inbox = Inbox()
        # Written by the threads that put requests and by the generating one, with single dict operations only.
        self._entries: dict[int, _Entry] = {}
        self._mine = threading.local()
        self._thread: threading.Thread | None = None
        self._is_shutdown = False
        # A step that runs while Python exits would use what is gone already.
        weakref.finalize(self, EngineDriver.destroy, self._driver)

    def start(self) -> None:
        """Starts the generating thread; once is enough.

        Raises:
            PipelineDestroyedError: The pipeline was shut down.
        """
        self._check_running()
        if self._thread is None:
            self._thread = threading.Thread(target=self, name="mii-generate", daemon=True)
            self._thread.start()

    def put_request(self, prompt: Any, kwargs: Mapping[str, Any] | None = None) -> int:
        """Queues one prompt.

        Args:
            prompt: A string or a list of token ids.
            kwargs: Options of `GenerateParamsConfig`. With ``stream=True`` there is a response for each new piece of
                text and a last one with no text and the finish reason, else one response with all of it.

        Returns:
            The number that comes back with the request's responses.

        Raises:
            pydantic.ValidationError: An option is unknown, of the wrong type or out of range.
            RequestError: The prompt is refused.
            PipelineDestroyedError: The pipeline was shut down.
        """
        self._check_running()
        options = dict(kwargs or {})
        streams = bool(options.pop("stream", False))
        read = self._intake.read(prompt, options)
        if len(read) != 1:
            raise PromptTypeError(f"put_request takes one prompt and got {len(read)}; call it once for each")
        entry = _Entry(read[0], self._mailbox(), streams)
        prepared, request = entry.prepared, entry.prepared.request
        self._tracker.add(
            request,
            prepared.stops,
            skip_special_tokens=prepared.skip_special_tokens,
            context=prepared.context,
            whole=not streams,
        )
        self._entries[request.uid] = entry
        entry.mailbox.expect(request.uid)
        try:
            self._driver.submit([request], self._inbox)
        except PipelineDestroyedError:
            self.flush_uid(request.uid)
            raise
        return request.uid

    def get_response(self, timeout: float | None = None) -> tuple[int, Response]:
        """Waits for the next response to a request of this thread.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            The request's number and the response.

        Raises:
            GenerationError: The request failed; the message says which.
            RequestError: The request can never run, because the engine has no room for it.
            RuntimeError: No request of this thread owes a response.
            TimeoutError: None came in time.
            PipelineDestroyedError: The pipeline was shut down while the request ran.
        """
        uid, item = self._mailbox().get(timeout)
        if isinstance(item, MIIError):
            raise type(item)(f"request {uid}: {item}") from item
        if isinstance(item, Exception):
            raise item
        return uid, item

    def flush_uid(self, uid: int) -> None:
        """Ends a request and frees all it holds; no further response to it comes. One that has ended is fine."""
        entry = self._entries.pop(uid, None)
        self._tracker.discard(uid)
        self._driver.abort([uid])
        if entry is not None:
            entry.mailbox.forget(uid)

    def shutdown(self) -> None:
        """Ends generation, tells every thread that waits, and frees the engine; harmless when called again."""
        self._is_shutdown = True
        self.destroy()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._end_all(PipelineDestroyedError("the pipeline was shut down before the answer was complete"))

    def is_shutdown(self) -> bool:
        """Whether `shutdown` was called, or the generating thread has ended by an error."""
        return self._is_shutdown

    def __call__(self) -> None:
        """The generation loop, until `shutdown`; `start` runs it in a thread of its own."""
        try:
            while self._driver.wait_for_work():
                self._dispatch(self._driver.take(self._inbox))
        except PipelineDestroyedError:
            pass
        except BaseException as error:
            self._is_shutdown = True
            failure = GenerationError(f"the generation loop failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self.destroy()
            self._end_all(failure)
            raise

    def _dispatch(self, deliveries: list[StepOutput | Failure]) -> None:
        ended = []
        for delivery in deliveries:
            if isinstance(delivery, Failure):
                self._fail(delivery.uids, delivery.error)
                continue
            for event in self._tracker.take(delivery):
                if event.abort:
                    ended.append(event.uid)
                self._pass_on(event)
        if ended:
            self._driver.abort(ended)

    def _pass_on(self, event: TextEvent) -> None:
        entry = self._entries.get(event.uid)
        if entry is None:
            return
        if event.finished:
            self._entries.pop(event.uid, None)
        entry.take(event)

    def _fail(self, uids: tuple[int, ...], error: Exception) -> None:
        for uid in uids:
            self._tracker.discard(uid)
            entry = self._entries.pop(uid, None)
            if entry is not None:
                entry.mailbox.put(uid, error, last=True)

    def _end_all(self, error: Exception) -> None:
        self._fail(tuple(self._entries), error)

    def _mailbox(self) -> _Mailbox:
        if not hasattr(self._mine, "mailbox"):
            self._mine.mailbox = _Mailbox()
        mailbox: _Mailbox = self._mine.mailbox
        return mailbox

    def _check_running(self) -> None:
        if self._is_shutdown:
            raise PipelineDestroyedError("this pipeline was shut down; make a new one with mii.api.async_pipeline(...)")
        self._driver.check_usable()
