"""Sums of processes on CPUs in pages that they share: bit for bit what adding in the order of the ranks gives."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from mii.logging import logger
from mii.parallel import pages
from mii.parallel.group import Group
from mii.parallel.pages import SharedPages
from tests.ops.kernel_checks import DTYPES
from tests.parallel.crew import Crew, with_pages
from tests.parallel.threads import on_ranks
from tests.serving.deployments import shared_memory, wait_until, without_owner

COUNTS = (1, 15, 16, 17, 576, 8191, 8192, 8193, 65536, 200_001)  # below and above what is shared, and what is one piece


def part(rank: int, count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """What a rank has; every rank can make every other one's."""
    return torch.randn(count, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def expected(size: int, count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    total = part(0, count, dtype, seed).float()
    for rank in range(1, size):
        total = total + part(rank, count, dtype, seed).float()
    return total.to(dtype)


@pytest.fixture(scope="module", params=[2, 4])
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    crew = Crew(request.param, with_pages, patience=30.0)
    yield crew
    crew.close()


def sums(memory: SharedPages, dtype: torch.dtype) -> None:
    size, rank = len(memory.memory), memory.rank
    for seed, count in enumerate(COUNTS):
        x = part(rank, count, dtype, seed)
        assert memory.all_reduce(x)
        assert torch.equal(x, expected(size, count, dtype, seed)), f"{count} of {dtype}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_in_the_order_of_the_ranks(crew: Crew, dtype: torch.dtype) -> None:
    crew.run(sums, dtype)


def mixed(memory: SharedPages, times: int) -> None:
    """Sums and gathers of any size after one another, now and then late on one rank."""
    size, rank, chance = len(memory.memory), memory.rank, random.Random(3)
    for seed in range(times):
        count, gathers, late = int(2 ** chance.uniform(0, 17.5)), chance.random() < 0.3, chance.randrange(8 * size)
        if late == rank:
            time.sleep(0.002)
        x = torch.full((count,), float(seed % 100 + rank))
        if gathers:
            out = torch.zeros(size, count)
            assert memory.all_gather(out, x)
            assert all((row == seed % 100 + r).all() for r, row in enumerate(out)), f"gather {seed} of {count}"
        else:
            assert memory.all_reduce(x)
            assert (x == size * (seed % 100) + size * (size - 1) // 2).all(), f"sum {seed} of {count}"


def test_whatever_follows_whatever(crew: Crew) -> None:
    crew.run(mixed, 300)


def small_sums(memory: SharedPages, times: int) -> None:
    x = torch.zeros(576)
    for _ in range(times):
        memory.all_reduce(x)


def alone(memory: SharedPages) -> tuple[str, float, float]:
    """A sum that a rank does not come to: what is said, after how long, and how long the next one takes."""
    x, begin, said = torch.ones(100), time.monotonic(), []
    for _ in range(2):
        try:
            memory.all_reduce(x)
        except RuntimeError as error:
            said.append((str(error), time.monotonic()))
    (first, at), (second, end) = said
    assert first == second
    return first, at - begin, end - at


@pytest.mark.parametrize(
    ("number", "said", "seconds"),
    [
        (signal.SIGKILL, "rank 1 of 3 has ended", 10.0),
        (signal.SIGSTOP, "rank 1 of 3 has not come to add up for 1.5 seconds", 10.0),
    ],
)
def test_a_rank_that_dies_or_hangs_is_named_and_not_waited_for_again(number: int, said: str, seconds: float) -> None:
    crew = Crew(3, with_pages, patience=30.0 if number == signal.SIGKILL else 1.5)
    crew.run(small_sums, 5)
    crew.signal(1, number)
    answers = crew.run(alone, ranks=(0, 2), seconds=60)
    crew.signal(1, signal.SIGKILL)
    crew.close()
    for first, waited, again in answers:
        assert said in first
        assert waited < seconds
        assert again < 1.4  # less than any patience


def maps(memory: SharedPages) -> str:
    return Path("/proc/self/maps").read_text()


def test_nothing_is_left_where_ranks_are_killed() -> None:
    before = shared_memory()
    crew = Crew(2, with_pages)
    mapped = [text for text in crew.run(maps) if "/memfd:mii-ranks (deleted)" in text]
    assert len(mapped) == 2
    for rank in range(2):
        crew.signal(rank, signal.SIGKILL)
    wait_until(lambda: not without_owner(shared_memory() - before), seen=lambda: shared_memory() - before)


def summed(group: Group) -> tuple[bool, list[float], list[list[float]]]:
    x = torch.arange(3.0) + group.rank
    group.all_reduce(x)
    return group._peers is not None, x.tolist(), group.all_gather(torch.tensor([group.rank, 7.0])).tolist()


def test_groups_of_threads_share_pages_too() -> None:
    right = (True, [3.0, 6.0, 9.0], [[0.0, 7.0], [1.0, 7.0], [2.0, 7.0]])
    assert on_ranks(3, summed) == [right] * 3


def test_gloo_serves_where_one_rank_cannot_map_the_pages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = pages._map

    def refuse(place: str, rank: int, size: int, pids: list[int]) -> SharedPages:
        if rank == 1:
            raise PermissionError(13, "Permission denied")
        return whole(place, rank, size, pids)

    monkeypatch.setattr(pages, "_map", refuse)
    logger.addHandler(caplog.handler)
    try:
        assert [taken for taken, *_ in on_ranks(2, summed)] == [False, False]
    finally:
        logger.removeHandler(caplog.handler)
    assert "gloo adds up what the ranks compute (rank 1: [Errno 13] Permission denied)" in caplog.text


def test_gloo_serves_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "REFUSED", True)
    assert [total for _, total, _ in on_ranks(2, summed)] == [[1.0, 3.0, 5.0]] * 2


def test_no_pages_over_several_hosts() -> None:
    assert pages.open_pages(dist.HashStore(), 0, 2, is_local=False) is None  # type: ignore[attr-defined]


def test_threads_that_wait_let_others_run() -> None:
    """The wait holds no lock of Python's."""
    ran = threading.Event()

    def late(group: Group) -> None:
        if group.rank == 1:
            assert ran.wait(60)
        elif group.rank == 0:
            threading.Timer(0.2, ran.set).start()
        group.all_reduce(torch.ones(4))

    on_ranks(2, late)
    assert ran.is_set()
