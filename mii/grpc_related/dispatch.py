"""Who gets which part of a call: the load balancer splits calls over replicas, finds others for what one gave back, and
holds calls for a moment while nobody can take them.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from mii.errors import RequestError, ServerBusyError, ServerUnavailableError
from mii.grpc_related.convert import positions_of
from mii.grpc_related.links import Link
from mii.grpc_related.proto.modelresponse_pb2 import MultiStringRequest
from mii.grpc_related.routing import PrefixMap, Work, choose, read_work
from mii.grpc_related.statuses import KIND
from mii.logging import logger

__all__ = ["Dispatcher", "Shard"]

_HOLD_SECONDS = 5.0
_MOST_RUNS = 3  # a prompt that kills engines is not tried on all of them
_RETRY_SECONDS = (0.1, 30.0)
_RECENT = 64
_T = TypeVar("_T")


@dataclass
class Shard:
    """The part of a call that goes to one replica.

    Args:
        link: the replica.
        request: the MultiStringRequest as it travels.
        places: of its prompts in the call.
        works: of its prompts.
        sent: whether something of the answers has gone to the caller.
    """

    link: Link
    request: bytes
    places: list[int]
    works: list[Work]
    sent: bool = False
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(work.cost for work in self.works)


class Dispatcher:
    """Sends calls to replicas. Made within a running event loop.

    Args:
        links: the replicas; they may come and go, see `on_change` and `on_removal`.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = links
        self.draining = False
        """Whether calls that nobody can take now are refused at once. Call `wake` after a change."""
        self.retries = 0
        self.held = 0
        self._prefixes = PrefixMap()
        self._changed = asyncio.Event()
        self._ends: deque[tuple[float, int]] = deque(maxlen=_RECENT)

    @property
    def prompts(self) -> int:
        """Prompts that replicas have."""
        return sum(link.prompts for link in self.links)

    def on_change(self, link: Link) -> None:
        """A replica has come or gone. One that comes back has nothing in its cache."""
        if not link.ready:
            self._prefixes.forget(link.index)
        self.wake()

    def on_removal(self, link: Link) -> None:
        """A replica is not among `links` any more."""
        self._prefixes.forget(link.index)
        self.wake()

    def wake(self) -> None:
        """Lets calls that are held look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def split(self, request: bytes) -> list[Shard]:
        """The parts of a call, at least one. Sleeps for a few seconds where no replica is ready.

        Raises:
            RequestError: it is no call.
            ServerBusyError: every replica is full.
            ServerUnavailableError: none has become ready.
        """
        try:
            call = MultiStringRequest.FromString(request)
        except DecodeError:
            raise RequestError("the request is no MultiStringRequest") from None
        places, works = positions_of(call), read_work(call)
        if not await self._hold(lambda: any(link.ready for link in self.links)):
            raise self._nobody()
        groups = self._assign(works)
        if len(groups) == 1:
            (link,) = groups
            return [Shard(link, request, places, works)]
        return [_cut(call, link, numbers, places, works) for link, numbers in groups.items()]

    async def carry(self, shard: Shard, run: Callable[[Link], Awaitable[_T]], name: str) -> _T:
        """Runs a part of a call, on another replica where the first one cannot and nothing was sent to the caller.

        Args:
            shard: the part.
            run: the RPC itself.
            name: the call's, for the log.

        Raises:
            grpc.aio.AioRpcError: how the last attempt ended.
            ServerUnavailableError: the same, where the connection ended and the replica has not said why.
        """
        tried: dict[Link, int] = {}
        for runs in itertools.count(1):
            link = shard.link
            tried[link] = link.life
            try:
                with link.carrying(len(shard.places), shard.tokens):
                    result = await run(link)
                self._ends.append((time.monotonic(), len(shard.places)))
                return result
            except grpc.aio.AioRpcError as error:
                failure = error
            another = None if shard.sent else await self._another(shard, tried, runs, failure.code())
            if another is None:
                raise _explained(failure, shard)
            self.retries += 1
            logger.info("call %s goes on from replica %d to %d: %s", name, link.index, another.index, failure.details())
            shard.link = another
        raise AssertionError

    def _assign(self, works: Sequence[Work]) -> dict[Link, list[int]]:
        """For each replica that gets some, the numbers of the prompts that it gets."""
        ready = [link for link in self.links if link.ready]
        if not works:
            return {ready[0]: []}
        groups: dict[Link, list[int]] = {}
        planned: dict[int, int] = {}
        for number, work in enumerate(works):
            links = [link for link in ready if link.room(len(groups.get(link, ())))]
            if not links:
                raise self._busy(len(works))
            link = self._choose(links, work, planned)
            groups.setdefault(link, []).append(number)
            planned[link.index] = planned.get(link.index, 0) + work.cost
        return groups

    def _choose(self, links: Sequence[Link], work: Work, planned: dict[int, int]) -> Link:
        if len(self.links) == 1:
            return links[0]
        link = choose(links, work, self._prefixes, planned)
        self._prefixes.record(work.keys, link.index)
        return link

    async def _another(self, shard: Shard, tried: dict[Link, int], runs: int, code: grpc.StatusCode) -> Link | None:
        """A replica for what one could not do; None: nobody. The same one counts again once it has been away."""

        def fresh() -> list[Link]:
            return [link for link in self.links if link.ready and link.room() and tried.get(link) != link.life]

        if code is grpc.StatusCode.UNAVAILABLE:
            if runs >= _MOST_RUNS or not await self._hold(lambda: bool(fresh())):
                return None
        elif code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            return None
        links = fresh()
        first = shard.works[0].keys if shard.works else ()
        return self._choose(links, Work(shard.tokens, first), {}) if links else None

    async def _hold(self, condition: Callable[[], bool]) -> bool:
        """Sleeps until the condition holds; False when it does not within a few seconds, or too many wait already."""
        if condition():
            return True
        if self.held >= sum(link.queue_size for link in self.links):
            return False
        self.held += 1
        try:
            await asyncio.wait_for(self._until(condition), _HOLD_SECONDS)
        except asyncio.TimeoutError:
            return False
        finally:
            self.held -= 1
        return condition()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self.draining:
            await self._changed.wait()

    def _nobody(self) -> ServerUnavailableError:
        if self.draining:
            return ServerUnavailableError("the deployment is shutting down")
        reasons = "; ".join(f"replica {link.index}: {link.reason}" for link in self.links) or "there is none"
        return ServerUnavailableError(f"no replica can answer now ({reasons}); try again soon")

    def _busy(self, count: int) -> ServerBusyError:
        error = ServerBusyError(
            f"the queues are full: {self.prompts} prompts are running or waiting, each of {len(self.links)} replicas "
            f"takes {self.links[0].queue_size} (queue_size), and this call has {count}; try again later"
        )
        shortest, longest = _RETRY_SECONDS
        speed = self._ends_a_second()
        error.retry_after = min(max(count / speed, shortest), longest) if speed else 1.0
        return error

    def _ends_a_second(self) -> float:
        """Prompts whose answers end in a second, by the last few calls; 0.0: not known."""
        if len(self._ends) < 2:
            return 0.0
        return sum(prompts for _, prompts in self._ends) / max(time.monotonic() - self._ends[0][0], 1e-3)


def _cut(
    call: MultiStringRequest, link: Link, numbers: Sequence[int], places: Sequence[int], works: Sequence[Work]
) -> Shard:
    """The part of a call that has these of its prompts."""
    texts = len(call.request)
    part = MultiStringRequest(
        request=[call.request[number] for number in numbers if number < texts],
        token_prompts=[call.token_prompts[number - texts] for number in numbers if number >= texts],
        positions=[places[number] for number in numbers],
    )
    for name, value in call.query_kwargs.items():
        part.query_kwargs[name].CopyFrom(value)
    return Shard(link, part.SerializeToString(), list(part.positions), [works[number] for number in numbers])


def _explained(failure: grpc.aio.AioRpcError, shard: Shard) -> Exception:
    """A connection that ended says nothing that a caller could use."""
    if failure.code() is not grpc.StatusCode.UNAVAILABLE or KIND in dict(failure.trailing_metadata() or ()):
        return failure
    how = "part of its answer had been sent" if shard.sent else "it could not be run again in time"
    return ServerUnavailableError(f"replica {shard.link.index}, which ran this call, is lost, and {how}")
