"""A pacer calls in order, at once while it may, and no more often than it was told."""

from __future__ import annotations

import asyncio
import time

from mii.grpc_related.pacer import Pacer


def test_few_are_called_at_once() -> None:
    async def run() -> list[int]:
        called: list[int] = []
        pacer = Pacer(rate=10, burst=5)
        for number in range(5):
            pacer.ask(lambda number=number: called.append(number))
        return called

    assert asyncio.run(run()) == [0, 1, 2, 3, 4]


def test_many_wait_their_turn() -> None:
    """600 calls at 2,000 a second of which 20 may come at once take 0.29 s or more; none comes early or twice."""

    async def run() -> tuple[list[int], float]:
        called: list[int] = []
        pacer = Pacer(rate=2000, burst=20)
        start = time.monotonic()
        for number in range(600):
            pacer.ask(lambda number=number: called.append(number))
        assert len(called) <= 21 + 2000 * (time.monotonic() - start)
        while len(called) < 600:
            await asyncio.sleep(0.005)
        return called, time.monotonic() - start

    called, seconds = asyncio.run(run())
    assert called == list(range(600))
    assert seconds >= 0.28


def test_a_pause_gives_no_more_than_the_burst_back() -> None:
    async def run() -> tuple[int, float]:
        pacer = Pacer(rate=100, burst=10)
        for _ in range(10):
            pacer.ask(lambda: None)
        await asyncio.sleep(0.3)
        called: list[int] = []
        start = time.monotonic()
        for number in range(50):
            pacer.ask(lambda number=number: called.append(number))
        return len(called), time.monotonic() - start

    called, seconds = asyncio.run(run())
    assert called <= 11 + 100 * seconds


def test_who_asks_from_within_a_call_comes_after_those_who_wait() -> None:
    async def run() -> list[str]:
        called: list[str] = []
        pacer = Pacer(rate=1000, burst=1)

        def again() -> None:
            called.append("first")
            pacer.ask(lambda: called.append("again"))

        pacer.ask(again)
        pacer.ask(lambda: called.append("second"))
        while len(called) < 3:
            await asyncio.sleep(0.002)
        return called

    assert asyncio.run(run()) in (["first", "again", "second"], ["first", "second", "again"])
