"""An engine that is divided among processes, for `mii bench offline --tensor-parallel N`.

The process of the command is rank 0 and starts the others, which meet it on a free port of this machine and end with
it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from mii.benchmark.offline import config_of, open_model
from mii.engine import build_engine
from mii.errors import MIIError
from mii.parallel.engines import FirstEngine, OtherEngine
from mii.parallel.ranks import Ranks, own_device

__all__ = ["Crew", "crew", "divided_engine"]

_HERE = "127.0.0.1"
_MEET_SECONDS = timedelta(minutes=5)
_REASON_SECONDS = 5.0  # in which rank 0 finds out by itself, and says more, that another rank has ended
_FAREWELL_SECONDS = 20.0
_MAKE, _END = "make", "end"


class Crew:
    """Ranks 0, which is this process, to size - 1; made by `crew`."""

    def __init__(self, args: argparse.Namespace, store: Any) -> None:
        self._args, self._store = args, store
        self._made = 0

    @contextmanager
    def engine(self) -> Iterator[FirstEngine]:
        """Rank 0's engine; the other ranks have theirs as long as it is there.

        Raises:
            mii.errors.LauncherError, mii.errors.LoadError: a rank cannot load its part.
        """
        self._store.set(_turn(self._made), _MAKE)
        engine = _load(self._args, 0, PrefixStore(_turn(self._made), self._store))
        assert isinstance(engine, FirstEngine)
        try:
            yield engine
        finally:
            engine.destroy()
            self._made += 1

    def end(self) -> None:
        """Lets the other processes end."""
        self._store.set(_turn(self._made), _END)


@contextmanager
def crew(args: argparse.Namespace) -> Iterator[Crew]:
    """Processes that make engines together, as often as they are asked for one.

    Args:
        args: those of `mii bench offline`.
    """
    size = args.tensor_parallel
    store = TCPStore(_HERE, 0, size, True, timeout=_MEET_SECONDS, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_follow, args=(args, rank, store.port), name=f"rank {rank} of {size}", daemon=True)
        for rank in range(1, size)
    ]
    for process in others:
        process.start()
    over, made = threading.Event(), Crew(args, store)
    threading.Thread(target=_watch, args=(others, over), daemon=True).start()
    try:
        yield made
    finally:
        over.set()
        made.end()
        for process in others:
            process.join(_FAREWELL_SECONDS)
            process.kill()


@contextmanager
def divided_engine(args: argparse.Namespace) -> Iterator[FirstEngine]:
    """Rank 0's engine; raises what `Crew.engine` does."""
    with crew(args) as ranks, ranks.engine() as engine:
        yield engine


def _turn(number: int) -> str:
    return f"engine-{number}"


def _follow(args: argparse.Namespace, rank: int, port: int) -> None:
    """Another rank, from its start to its end."""
    from mii.logging import set_level

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; rank 0 ends the others
    os.environ["LOCAL_RANK"] = str(rank)
    set_level("info" if args.verbose else "warning")
    store = TCPStore(_HERE, port, args.tensor_parallel, False, timeout=_MEET_SECONDS, wait_for_workers=False)
    turns = map(_turn, itertools.count())
    try:
        while store.get(turn := next(turns)).decode() == _MAKE:
            engine = _load(args, rank, PrefixStore(turn, store))
            assert isinstance(engine, OtherEngine)
            try:
                engine.follow()
            finally:
                engine.destroy()
    except MIIError:  # rank 0 says it
        sys.exit(1)


def _load(args: argparse.Namespace, rank: int, store: Any) -> Any:
    config, size = config_of(args), args.tensor_parallel
    device = own_device(config)
    if device == torch.device("cpu") and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    ranks = Ranks(store, rank, size, device)
    assert isinstance(device, torch.device)
    with ranks.loading(), open_model(args, device) as checkpoint:
        return build_engine(config, checkpoint, None, ranks)


def _watch(others: Sequence[SpawnProcess], over: threading.Event) -> None:
    """Ends this process when another rank has ended: rank 0 may wait for it in a place where nobody looks."""
    connection.wait([process.sentinel for process in others])
    if over.wait(_REASON_SECONDS):
        return
    ended = [f"{process.name} (exit code {process.exitcode})" for process in others if not process.is_alive()]
    print(f"mii bench offline: error: {', '.join(ended)} has ended", file=sys.stderr, flush=True)
    for process in others:
        process.kill()
    os._exit(1)
