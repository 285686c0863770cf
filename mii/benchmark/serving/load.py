"""When requests are sent: each client one after the other (closed loop), or at random times (Poisson arrivals)."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from mii.benchmark.serving.target import Target
from mii.benchmark.serving.trace import Failed, Trace
from mii.benchmark.serving.work import Ask

__all__ = ["Load", "Packed", "Ran", "pack", "run_load"]

# As in DeepSpeed-FastGen's benchmark: clients do not all begin in the same moment.
_JITTER_SECONDS_A_CLIENT = 0.010
_LONGEST_JITTER_SECONDS = 1.0
_LOOK_SECONDS = 0.02


class Load(msgspec.Struct, frozen=True):
    """How requests come; one of the two is given.

    Args:
        clients: of a closed loop.
        rate: requests a second, at random times.
    """

    clients: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.clients} clients" if self.clients else f"{self.rate:g} requests/s"

    def as_dict(self) -> dict[str, Any]:
        """For a report, with its name."""
        return {"name": str(self), "clients": self.clients, "rate": self.rate}


class Packed(msgspec.Struct, frozen=True):
    """A request that is ready to be sent."""

    payload: bytes
    prompt_tokens: int
    new_tokens: int


class Ran(msgspec.Struct):
    """What a load came to.

    Args:
        traces: one for each request.
        processor_seconds: that this process used meanwhile.
        lateness: how late this process was at each of its looks at the clock, in seconds: what it adds to what it
            measures.
    """

    traces: list[Trace]
    processor_seconds: float
    lateness: list[float]


def pack(target: Target, asks: Sequence[Ask]) -> list[Packed]:
    """Requests ready to be sent."""
    return [Packed(target.pack(ask), ask.prompt_tokens, ask.new_tokens) for ask in asks]


async def run_load(target: Target, requests: Sequence[Packed], load: Load, *, exact: bool, seed: int = 0) -> Ran:
    """Sends all requests and waits for the last answer.

    Args:
        target: where they go.
        requests: what is sent.
        load: when.
        exact: an answer with fewer tokens than asked for is an error.
        seed: of the random times.
    """
    gc.collect()
    gc.freeze()  # the requests; a collection would look at all of them
    late: list[float] = []
    watch = asyncio.ensure_future(_watch_clock(late))
    begin = time.process_time()
    try:
        run = _closed_loop if load.clients else _poisson
        traces = await run(target, requests, load, exact, random.Random(seed))
    finally:
        watch.cancel()
        gc.unfreeze()
    return Ran(traces, time.process_time() - begin, late)


async def _closed_loop(
    target: Target, requests: Sequence[Packed], load: Load, exact: bool, rng: random.Random
) -> list[Trace]:
    waiting = iter(requests)
    assert load.clients is not None
    most = min(_JITTER_SECONDS_A_CLIENT * load.clients, _LONGEST_JITTER_SECONDS)
    delays = [rng.uniform(0, most) for _ in range(load.clients)]
    delays[0] = 0.0
    parts = await asyncio.gather(*(_client(target, waiting, delay, exact) for delay in delays))
    return [trace for part in parts for trace in part]


async def _client(target: Target, waiting: Iterator[Packed], delay: float, exact: bool) -> list[Trace]:
    await asyncio.sleep(delay)
    return [await _send(target, request, time.monotonic(), exact) for request in waiting]


async def _poisson(
    target: Target, requests: Sequence[Packed], load: Load, exact: bool, rng: random.Random
) -> list[Trace]:
    assert load.rate is not None
    due, tasks = time.monotonic(), []
    for request in requests:
        due += rng.expovariate(load.rate)
        await asyncio.sleep(due - time.monotonic())
        tasks.append(asyncio.ensure_future(_send(target, request, due, exact)))
    return await asyncio.gather(*tasks)


async def _send(target: Target, request: Packed, due: float, exact: bool) -> Trace:
    trace = Trace(due, request.new_tokens, request.prompt_tokens, sent=time.monotonic(), times=[], counts=[])
    try:
        await target.send(request.payload, trace)
        if exact and trace.tokens < trace.new_tokens:
            raise Failed("short answer", f"{trace.tokens} tokens came of {trace.new_tokens}")
    except Failed as failure:
        trace.kind, trace.message = failure.kind, str(failure)
    trace.ended = time.monotonic()
    return trace


async def _watch_clock(late: list[float]) -> None:
    while True:
        due = time.monotonic() + _LOOK_SECONDS
        await asyncio.sleep(_LOOK_SECONDS)
        late.append(time.monotonic() - due)
