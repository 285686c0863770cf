"""Processes with a GPU each that do the same at the same time: what tests of sums over GPUs run on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from mii.parallel import peers
from mii.parallel.peers import PeerMemory, open_peers

Work = Callable[..., Any]  # takes the rank's PeerMemory first; at a module's top level


class Crew:
    """Ranks 0 to size - 1, each a process with the GPU of its number and the memory that it shares with the others.

    Args:
        size: how many.
        patience: seconds that a GPU waits for another one.
    """

    def __init__(self, size: int, patience: float = 10.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._store = TCPStore("127.0.0.1", 0, size + 1, True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            self._pipes.append(mine)
            arguments = (theirs, rank, size, self._store.port, patience)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.processes[-1].start()

    def run(self, work: Work, *arguments: Any, ranks: list[int] | None = None, seconds: float = 60) -> list[Any]:
        """Calls `work(peers, *arguments)` on the ranks at once; what each returned.

        Raises:
            AssertionError: with what a rank raised.
        """
        chosen = range(len(self._pipes)) if ranks is None else ranks
        for rank in chosen:
            self._pipes[rank].send((work, arguments))
        answers = []
        for rank in chosen:
            assert self._pipes[rank].poll(seconds), f"rank {rank} has not answered for {seconds} seconds"
            answers.append(self._pipes[rank].recv())
        for rank, (_, error) in zip(chosen, answers, strict=True):
            assert error is None, f"rank {rank}: {error}"
        return [answer for answer, _ in answers]

    def kill(self, rank: int) -> None:
        """Ends a rank at once."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self.processes[rank].join()

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()


def _serve(pipe: Connection, rank: int, size: int, port: int, patience: float) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    peers.ASKED_FOR, peers.PATIENCE_SECONDS = True, patience
    store = TCPStore("127.0.0.1", port, size + 1, False, timeout=timedelta(seconds=60), wait_for_workers=False)
    memory = open_peers(PrefixStore("peers", store), rank, size, device, True)
    while (job := pipe.recv()) is not None:
        work, arguments = job
        try:
            assert isinstance(memory, PeerMemory), "the GPUs do not see each other's memory"
            pipe.send((work(memory, *arguments), None))
        except BaseException as error:
            pipe.send((None, f"{type(error).__name__}: {error}"))
    if memory is not None:
        memory.close(PrefixStore("peers", store))
