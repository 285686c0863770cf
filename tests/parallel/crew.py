"""Processes that do the same at the same time, as ranks do: what tests of memory that ranks share run on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from mii.parallel import pages, peers
from mii.parallel.group import Group
from mii.parallel.pages import SharedPages, open_pages
from mii.parallel.peers import PeerMemory, open_peers

Memory = PeerMemory | SharedPages | Group
Start = Callable[[Any, int, int, float], Memory | None]
Work = Callable[..., Any]  # takes what `start` gave first; at a module's top level


class Crew:
    """Ranks 0 to size - 1, each a process.

    Args:
        size: how many.
        start: what each begins with, of (store, rank, size, patience); at a module's top level.
        patience: seconds that a rank waits for another one.
    """

    def __init__(self, size: int, start: Start, patience: float = 10.0) -> None:
        context = multiprocessing.get_context("forkserver")  # which imports torch once, and starts nothing of it
        context.set_forkserver_preload(["torch", __name__])
        self._store = TCPStore("127.0.0.1", 0, size + 1, True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            self._pipes.append(mine)
            arguments = (theirs, start, rank, size, self._store.port, patience)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.processes[-1].start()

    def run(self, work: Work, *arguments: Any, ranks: Iterable[int] | None = None, seconds: float = 120) -> list[Any]:
        """Calls `work(memory, *arguments)` on the ranks at once; what each returned.

        Raises:
            AssertionError: with what a rank raised.
        """
        chosen = list(range(len(self._pipes)) if ranks is None else ranks)
        for rank in chosen:
            self._pipes[rank].send((work, arguments))
        answers = []
        for rank in chosen:
            assert self._pipes[rank].poll(seconds), f"rank {rank} has not answered for {seconds} seconds"
            answers.append(self._pipes[rank].recv())
        for rank, (_, error) in zip(chosen, answers, strict=True):
            assert error is None, f"rank {rank}: {error}"
        return [answer for answer, _ in answers]

    def signal(self, rank: int, number: int) -> None:
        """Sends a signal to a rank; SIGKILL is waited for."""
        pid = self.processes[rank].pid
        assert pid is not None
        if self.processes[rank].is_alive():
            os.kill(pid, number)
        if number == signal.SIGKILL:
            self.processes[rank].join()

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()


def with_gpus(store: Any, rank: int, size: int, patience: float) -> PeerMemory | None:
    """Each rank with the GPU of its number."""
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    peers.ASKED_FOR, peers.PATIENCE_SECONDS = True, patience
    return open_peers(store, rank, size, device, True)


def with_pages(store: Any, rank: int, size: int, patience: float) -> SharedPages | None:
    """Each rank on a CPU, with memory that all have mapped."""
    torch.set_num_threads(1)
    pages.STEP_SECONDS = patience
    return open_pages(store, rank, size, True)


def with_group(store: Any, rank: int, size: int, patience: float) -> Group:
    """Each rank on a CPU, with a group as an engine has."""
    torch.set_num_threads(1)
    return Group(store, rank, size, torch.device("cpu"))


def _serve(pipe: Connection, start: Start, rank: int, size: int, port: int, patience: float) -> None:
    store = TCPStore("127.0.0.1", port, size + 1, False, timeout=timedelta(seconds=60), wait_for_workers=False)
    memory = start(PrefixStore("peers", store), rank, size, patience)
    while (job := pipe.recv()) is not None:
        work, arguments = job
        try:
            assert memory is not None, "the ranks do not see each other's memory"
            pipe.send((work(memory, *arguments), None))
        except BaseException as error:
            pipe.send((None, f"{type(error).__name__}: {error}"))
    if isinstance(memory, Group):
        memory.close()
    elif memory is not None:
        memory.close(PrefixStore("peers", store))
