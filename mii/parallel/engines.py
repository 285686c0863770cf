"""An engine whose model is divided among ranks: `FirstEngine` takes requests on rank 0, `OtherEngine` follows
elsewhere.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from typing import Any

import torch

from mii.batching.data_classes import EngineRequest, StepOutput, TokenOutput
from mii.engine.engine import Engine, EngineStats
from mii.engine.timeline import Timeline
from mii.errors import GenerationError, PipelineDestroyedError, RequestError
from mii.logging import logger
from mii.parallel.channel import FirstChannel, OtherChannel
from mii.parallel.group import Group
from mii.parallel.messages import Refused, Work
from mii.parallel.watch import FirstWatch, OtherWatch

_FAREWELL_SECONDS = 5.0


class _Ranked:
    """What both have of their engine."""

    def __init__(self, engine: Engine, watch: FirstWatch | OtherWatch, group: Group) -> None:
        self.engine, self._watch, self._group = engine, watch, group
        self.max_length, self.vocab_size, self.stop_ids = engine.max_length, engine.vocab_size, engine.stop_ids
        self.num_blocks, self.block_size = engine.num_blocks, engine.block_size
        self.start_report = engine.start_report

    @property
    def runner(self) -> Any:
        return self.engine.runner

    @property
    def capacity(self) -> int:
        """As `Engine.capacity`."""
        return self.engine.capacity

    def stats(self) -> EngineStats:
        """As `Engine.stats`."""
        return self.engine.stats()


class FirstEngine(_Ranked):
    """The engine of rank 0: what is asked of it happens on every rank.

    Args:
        engine: This rank's.
        channel: To the other ranks.
        watch: For the other ranks.
        group: Of all ranks.
    """

    def __init__(self, engine: Engine, channel: FirstChannel, watch: FirstWatch, group: Group) -> None:
        super().__init__(engine, watch, group)
        self._channel = channel
        self._commands: list[EngineRequest | int] = []
        self._broken = ""
        self.runner.agree = self._send
        # A script that ends without destroy() still tells the other ranks.
        weakref.finalize(self, channel.close)
        weakref.finalize(self, watch.close)

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    def add_request(self, request: EngineRequest) -> None:
        """As `Engine.add_request`; the others get the request with the next step."""
        self.engine.add_request(request)
        self._commands.append(request)

    def abort(self, uid: int) -> None:
        """As `Engine.abort`."""
        self.engine.abort(uid)
        self._commands.append(uid)

    def step(self) -> StepOutput:
        """As `Engine.step`.

        Raises:
            GenerationError: A rank failed or is gone. The group is lost with it: every later step says so too.
        """
        if self._broken:
            raise GenerationError(self._broken)
        try:
            with self._watch.step():
                return self.engine.step()
        except PipelineDestroyedError:
            raise
        except Exception as error:
            self._broken = self._channel.explain(error)
            raise GenerationError(self._broken) from error

    def record(self, timeline: Timeline | None) -> None:
        """As `Engine.record`, on this rank."""
        self.engine.record(timeline)

    def destroy(self) -> None:
        """Ends the engines of all ranks."""
        self._watch.close()
        self._channel.close()
        self.engine.destroy()
        self._group.close()

    def _send(self, digest: int) -> None:
        commands, self._commands = self._commands, []
        self._channel.work(Work(digest, commands))


class OtherEngine(_Ranked):
    """The engine of another rank. `follow` does what rank 0 says until it ends; `start` does so in a thread.

    In a script it also stands for an engine that is asked the same things as rank 0's, and gives the same tokens, in
    place of which rank 0's requests count.

    Args:
        engine: This rank's.
        channel: To rank 0.
        watch: For rank 0.
        group: Of all ranks.
        keeps: Keep tokens for a caller on this rank.
    """

    def __init__(
        self, engine: Engine, channel: OtherChannel, watch: OtherWatch, group: Group, *, keeps: bool = False
    ) -> None:
        super().__init__(engine, watch, group)
        self._channel, self._keeps = channel, keeps
        self._digest = 0
        self._changed = threading.Condition()
        self._outputs: deque[TokenOutput] = deque()
        self._wanted: set[int] = set()
        self._newest = 0  # rank 0 may be ahead: what comes of later requests is kept for them
        self._ended = False
        self._thread: threading.Thread | None = None
        self.runner.agree = self._compare

    # -- following ----------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Returns when rank 0 is done.

        Raises:
            GenerationError: This rank cannot go on, or rank 0 is gone.
        """
        try:
            while isinstance(said := self._channel.receive(), Work):
                self._do(said)
            if isinstance(said, Refused):
                raise GenerationError(said.reason)
        except Exception as error:
            self._channel.fail(str(error) if isinstance(error, GenerationError) else f"{type(error).__name__}: {error}")
            self._channel.wait_end(_FAREWELL_SECONDS)
            raise
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _do(self, work: Work) -> None:
        for command in work.commands:
            if isinstance(command, int):
                self.engine.abort(command)
            else:
                self.engine.add_request(command)
        self._digest = work.digest
        with self._watch.step():
            outputs = self.engine.step()
        if self._keeps:
            with self._changed:
                self._outputs += outputs
                self._changed.notify_all()

    def _compare(self, digest: int) -> None:
        if digest != self._digest:
            raise GenerationError(
                "it has planned another step than rank 0, so their tokens or caches have come apart; the group ends"
            )

    def start(self) -> None:
        """Follows in a thread; the process waits for its end before it exits."""
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._follow_or_exit, name="mii-rank", daemon=True)
        self._thread.start()
        atexit.register(self._thread.join)

    def _follow_or_exit(self) -> None:
        """A rank that cannot go on ends its process: whatever its script waits for would never come."""
        try:
            torch.set_num_threads(self._threads)  # OpenMP keeps this for each thread on its own
            if self.engine.runner is not None and self.engine.runner.device.type == "cuda":
                torch.cuda.set_device(self.engine.runner.device)
            self.follow()
        except BaseException as error:
            logger.error("rank %d ends: %s", self._channel.rank, error)
            os._exit(1)

    # -- in place of an engine ----------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._wanted)

    def add_request(self, request: EngineRequest) -> None:
        """Expects the tokens of the request that rank 0 has under the same number.

        Raises:
            RequestError: This rank keeps no tokens.
        """
        if not self._keeps:
            raise RequestError(f"this is rank {self._channel.rank} of {self._group.size}; rank 0 takes requests")
        self._wanted.add(request.uid)
        self._newest = max(self._newest, request.uid)

    def abort(self, uid: int) -> None:
        """Expects no more of a request; whether it ends, rank 0 says."""
        self._wanted.discard(uid)

    def step(self) -> StepOutput:
        """Waits for tokens of the expected requests.

        Raises:
            GenerationError: Rank 0 has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or any(each.uid in self._wanted for each in self._outputs))
            outputs = [output for output in self._outputs if output.uid in self._wanted]
            self._outputs = deque(output for output in self._outputs if output.uid > self._newest)
        if self._ended and not outputs:
            raise GenerationError("rank 0 has ended before this answer was complete")
        for output in outputs:
            if output.finish_reason is not None:
                self._wanted.discard(output.uid)
        return StepOutput.of(outputs)

    def destroy(self) -> None:
        """Waits until rank 0 is done, and frees the engine."""
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self._thread.join)
            self._thread = None
        self._watch.close()
        self._channel.close()
        self.engine.destroy()
        self._group.close()
