"""Ranks as threads of one process: real groups, without the start of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from mii.engine import build_engine
from mii.errors import GenerationError
from mii.modeling.checkpoint import open_checkpoint
from mii.parallel.engines import FirstEngine
from mii.parallel.group import Group
from mii.parallel.ranks import Ranks
from tests.oracle import small_config

T = TypeVar("T")


def on_threads(size: int, work: Callable[[int], T]) -> list[T]:
    """What `work` returns for each of `size` ranks; raises what the first of them that failed raised."""
    results, errors = {}, {}

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors.values():
        raise error
    return [results[rank] for rank in range(size)]


def on_ranks(size: int, work: Callable[[Group], T]) -> list[T]:
    """What `work` returns on each of `size` ranks; raises what the first of them that failed raised."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        group = Group(dist.PrefixStore("test", store), rank, size, torch.device("cpu"))
        try:
            return work(group)
        finally:
            group.close()

    return on_threads(size, run)


class ThreadGroup:
    """A rank among threads of one process: what it exchanges, on any device, is handed over as it is."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, given: list[torch.Tensor | None]) -> None:
        self.rank, self.size, self.local_size = rank, size, size
        self._barrier, self._given = barrier, given

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._given[self.rank] = tensor
        self._barrier.wait()
        gathered = torch.stack([each for each in self._given if each is not None])
        self._barrier.wait()
        return gathered


def on_one_device(size: int, work: Callable[[Any], T]) -> list[T]:
    """As `on_ranks`, of ranks that share a device and its stream."""
    barrier, given = threading.Barrier(size), [None] * size
    return on_threads(size, lambda rank: work(ThreadGroup(rank, size, barrier, given)))  # type: ignore[arg-type]


@contextmanager
def ranked_engine(folder: Path, size: int, *, folders: Sequence[Path] = (), **options: Any) -> Iterator[FirstEngine]:
    """Rank 0's engine of a model that is divided among `size` ranks; the others follow in threads of their own.

    `folders`: another one for each rank.
    """
    started: Queue[FirstEngine | BaseException] = Queue()
    store = dist.HashStore()

    def run(rank: int) -> None:
        try:
            ranks = Ranks(dist.PrefixStore("test", store), rank, size, torch.device("cpu"))
            mine = folders[rank] if folders else folder
            config = small_config(mine, tensor_parallel=size, **options)
            with ranks.loading(), open_checkpoint(mine) as checkpoint:
                engine = build_engine(config, checkpoint, False, ranks)
        except BaseException as error:
            if rank == 0:
                started.put(error)
            return
        if isinstance(engine, FirstEngine):
            started.put(engine)
        else:
            with suppress(GenerationError):  # rank 0 was told
                engine.follow()
            engine.destroy()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    engine = started.get()
    try:
        if isinstance(engine, BaseException):
            raise engine
        yield engine
    finally:
        if isinstance(engine, FirstEngine):
            engine.destroy()
        for thread in threads:
            thread.join()
