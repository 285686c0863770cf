"""Several threads, one engine: whoever waits for tokens runs the next step for all, so their requests share batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from mii.batching.data_classes import EngineRequest, StepOutput
from mii.batching.interrupts import InterruptsDeferred
from mii.errors import GenerationError, PipelineDestroyedError


class TokenEngine(Protocol):
    """What generates tokens: `mii.engine.Engine`, or a stand-in. Never called by two threads at once."""

    max_length: int
    vocab_size: int
    stop_ids: tuple[int, ...]

    @property
    def has_work(self) -> bool: ...

    def add_request(self, request: EngineRequest) -> None: ...

    def step(self) -> StepOutput: ...

    def abort(self, uid: int) -> None: ...

    def destroy(self) -> None: ...


@dataclass(frozen=True)
class Failure:
    """Requests that ended with no answer, and why: refused as they came, or caught by a step that failed.

    Args:
        uids: The requests; where one was refused, all that were submitted with it.
        error: To be raised by whoever waits for them.
        refused: The request that was refused; None after a step that failed.
    """

    uids: tuple[int, ...]
    error: Exception
    refused: int | None = None


@dataclass(eq=False)
class Inbox:
    """What the engine said to one caller, and the caller has not taken yet."""

    deliveries: list[StepOutput | Failure] = field(default_factory=list)

    def take(self) -> list[StepOutput | Failure]:
        deliveries, self.deliveries = self.deliveries, []
        return deliveries


class EngineDriver:
    """Shares an engine between threads.

    Args:
        engine: It belongs to the driver from now on.

    Threads leave what they want (requests, aborts) as commands; the one whose turn it is carries them out between two
    steps. A turn is never interrupted in the middle.
    """

    def __init__(self, engine: TokenEngine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._owners: dict[int, Inbox] = {}
        self._in_turn = False
        self._destroyed = False

    def submit(self, requests: Sequence[EngineRequest], inbox: Inbox) -> None:
        """Queues requests, all or none: a `Failure` is delivered if the engine can never run one of them.

        Raises:
            PipelineDestroyedError: `destroy` was called.
        """
        with self._changed:
            self.check_usable()
            self._commands.append(partial(self._admit, list(requests), inbox))
            self._changed.notify_all()

    def take(self, inbox: Inbox) -> list[StepOutput | Failure]:
        """What the engine has to say to the owner of `inbox`, after one step more if it is nothing yet.

        Returns:
            The deliveries; none, if the step was about other requests. When a step fails, every thread that waits gets
            a `Failure` at once, and the engine is as if it had never had their requests.

        Raises:
            PipelineDestroyedError: `destroy` was called.
        """
        with InterruptsDeferred():
            if not inbox.deliveries and self._begin_turn():
                self._step()
        with self._changed:
            self._changed.wait_for(lambda: inbox.deliveries or not self._in_turn or self._destroyed)
            if not inbox.deliveries:
                self.check_usable()
            return inbox.take()

    def abort(self, uids: Iterable[int]) -> None:
        """Ends requests and frees what they hold: now, or when the step that is running is over."""
        with InterruptsDeferred():
            with self._changed:
                self._commands.append(partial(self._drop, list(uids)))
                self._changed.notify_all()
            if self._begin_turn():
                self._end_turn()

    def wait_for_work(self) -> bool:
        """Sleeps until there is something to do; False once the driver is destroyed."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands or self._owners or self._destroyed)
            return not self._destroyed

    def destroy(self) -> None:
        """Frees the engine after the step that is running; threads that wait get `PipelineDestroyedError`."""
        with InterruptsDeferred():
            with self._changed:
                if self._destroyed:
                    return
                self._destroyed = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._in_turn)
                self._commands.clear()
                self._owners.clear()
            self._engine.destroy()

    def check_usable(self) -> None:
        """Raises `PipelineDestroyedError` once `destroy` was called."""
        if self._destroyed:
            raise PipelineDestroyedError("this pipeline was destroyed; make a new one with mii.pipeline(...)")

    def _begin_turn(self) -> bool:
        """Whether the engine is this thread's alone, until `_end_turn`."""
        with self._changed:
            if self._in_turn or self._destroyed:
                return False
            self._in_turn = True
            return True

    def _step(self) -> None:
        output = StepOutput()
        try:
            self._run_commands()
            if self._engine.has_work:
                output = self._engine.step()
            elif self._owners:
                raise RuntimeError("it has nothing to do, and these requests have not ended")
        except BaseException as error:
            self._fail_all(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._end_turn(output)

    def _fail_all(self, cause: BaseException) -> None:
        """A step that fails may have lost tokens of any request, so all of them end."""
        uids: dict[Inbox, list[int]] = {}
        with self._changed:
            for uid, inbox in self._owners.items():
                uids.setdefault(inbox, []).append(uid)
            for inbox, theirs in uids.items():
                error = GenerationError(f"the engine failed: {type(cause).__name__}: {cause}")
                error.__cause__ = cause
                inbox.deliveries.append(Failure(tuple(theirs), error))
            self._drop(list(self._owners))

    def _end_turn(self, output: StepOutput | None = None) -> None:
        with self._changed:
            if output is not None:
                self._deliver(output)
            try:
                self._run_commands()
            finally:
                self._in_turn = False
                self._changed.notify_all()

    def _deliver(self, output: StepOutput) -> None:
        """Gives each caller what is said of its requests. Nobody owns those that were aborted while the step ran."""
        owners = list(map(self._owners.get, output.uids))
        parts: dict[Inbox | None, StepOutput] = {}
        if owners and owners.count(owners[0]) == len(owners):  # mostly one caller has them all
            parts[owners[0]] = StepOutput(output.uids, output.token_ids, [])
        else:
            for owner, uid, token_id in zip(owners, output.uids, output.token_ids, strict=True):
                part = parts.setdefault(owner, StepOutput([], [], []))
                part.uids.append(uid)
                part.token_ids.append(token_id)
        for other in output.others:
            owner = self._owners.get(other.uid)
            parts.setdefault(owner, StepOutput([], [], [])).others.append(other)
            if other.finish_reason is not None:
                self._owners.pop(other.uid, None)
        for owner, part in parts.items():
            if owner is not None:
                owner.deliveries.append(part)

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _admit(self, requests: list[EngineRequest], inbox: Inbox) -> None:
        for at, request in enumerate(requests):
            try:
                self._engine.add_request(request)
            except ValueError as error:
                self._drop([earlier.uid for earlier in requests[:at]])
                inbox.deliveries.append(Failure(tuple(each.uid for each in requests), error, request.uid))
                return
            self._owners[request.uid] = inbox

    def _drop(self, uids: list[int]) -> None:
        for uid in uids:
            if self._owners.pop(uid, None) is not None:
                self._engine.abort(uid)
