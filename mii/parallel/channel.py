"""The sockets between rank 0 and the other ranks. Messages from rank 0 arrive in order, and none is lost."""

from __future__ import annotations

import time

import zmq

from mii.errors import GenerationError, LauncherError
from mii.parallel.messages import (
    End,
    Failed,
    Hello,
    Refused,
    ToFirst,
    ToOthers,
    Welcome,
    Work,
    decode_to_first,
    decode_to_others,
    encode,
)

_LINGER_MS = 1000
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 2000, 8000
# After one rank could not go on, another may be about to say why.
_REASON_SECONDS = 1.0


class FirstChannel:
    """Rank 0's end.

    Args:
        size: ranks of the group.
        address: where to listen; ``tcp://host:*`` takes any port.
    """

    def __init__(self, size: int, address: str) -> None:
        self._size = size
        self._context = zmq.Context(io_threads=1)
        self._context.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a rank that is gone is an error
        self._socket.set_hwm(0)
        _watch(self._socket)
        self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where the others find it."""

    def settle(self, mine: Hello) -> int:
        """Waits for every other rank, compares, and tells them how many KV blocks there are; returns that too.

        Raises:
            LauncherError: one of them failed, or does not fit to this one. All are told.
        """
        blocks, waiting = mine.blocks, set(range(1, self._size))
        while waiting:
            said = decode_to_first(self._socket.recv_multipart()[1])
            reason = said.reason if isinstance(said, Failed) else _difference(mine, said)
            if reason:
                self.refuse(f"rank {said.rank}: {reason}")
                raise LauncherError(f"rank {said.rank} of {self._size}: {reason}")
            assert isinstance(said, Hello)
            waiting.discard(said.rank)
            blocks = min(blocks, said.blocks)
        self._send(Welcome(blocks))
        return blocks

    def refuse(self, reason: str) -> None:
        """Ends the group. Who has not come yet finds nobody."""
        for rank in range(1, self._size):
            try:
                self._socket.send_multipart((_name(rank), encode(Refused(reason))))
            except zmq.ZMQError:  # it has not come yet, or is gone
                continue

    def work(self, work: Work) -> None:
        """Begins a step on the other ranks.

        Raises:
            GenerationError: one of them is gone, or has failed.
        """
        reason = self._failure(0)
        if reason:
            raise GenerationError(reason)
        self._send(work)

    def explain(self, error: BaseException) -> str:
        """Why a step failed: what a rank says of it or, if none does, what went wrong here."""
        return self._failure(_REASON_SECONDS) or f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """Tells the others that it is over."""
        if not self._context.closed:
            for rank in range(1, self._size):
                try:
                    self._socket.send_multipart((_name(rank), encode(End())), zmq.NOBLOCK)
                except zmq.ZMQError:  # it is gone already
                    continue
            self._context.destroy()

    def _failure(self, seconds: float) -> str:
        if not self._socket.poll(int(1000 * seconds)):
            return ""
        said = decode_to_first(self._socket.recv_multipart()[1])
        return f"rank {said.rank} of {self._size} failed: {said.reason}" if isinstance(said, Failed) else ""

    def _send(self, message: ToOthers) -> None:
        data = encode(message)
        for rank in range(1, self._size):
            try:
                self._socket.send_multipart((_name(rank), data))
            except zmq.ZMQError as error:
                raise GenerationError(f"rank {rank} of {self._size} is gone ({error.strerror})") from error


class OtherChannel:
    """Another rank's end.

    Args:
        rank: which one.
        address: where rank 0 listens.
    """

    def __init__(self, rank: int, address: str) -> None:
        self.rank = rank
        self._context = zmq.Context(io_threads=1)
        self._context.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, _name(rank))
        self._socket.set_hwm(0)
        _watch(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def settle(self, mine: Hello) -> int:
        """Introduces this rank; returns how many KV blocks to make.

        Raises:
            LauncherError: the ranks do not fit together, or one of them failed.
        """
        self._send(mine)
        said = self.receive()
        if isinstance(said, Welcome):
            return said.blocks
        raise LauncherError(said.reason if isinstance(said, Refused) else "rank 0 has ended")

    def receive(self) -> ToOthers:
        """The next message; `End` if rank 0 is gone."""
        while True:
            ready = dict(self._poller.poll())
            if self._socket in ready:
                return decode_to_others(self._socket.recv())
            if self._monitor in ready:
                return Refused("rank 0 is gone")

    def fail(self, reason: str) -> None:
        """Says that this rank cannot go on."""
        self._send(Failed(self.rank, reason))

    def wait_end(self, seconds: float) -> None:
        """Until rank 0 has had time to print what went wrong."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(self._poller.poll(int(1000 * left)))
            if self._monitor in ready or not ready:
                return
            if isinstance(decode_to_others(self._socket.recv()), End | Refused):
                return

    def close(self) -> None:
        if not self._context.closed:
            self._socket.disable_monitor()
            self._context.destroy()

    def _send(self, message: ToFirst) -> None:
        self._socket.send(encode(message))


def _name(rank: int) -> bytes:
    return f"rank-{rank}".encode()  # the first byte of an identity must not be 0


def _watch(socket: zmq.Socket[bytes]) -> None:
    """A machine that stands still or is cut off counts as gone."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)


def _difference(first: Hello, other: Hello) -> str:
    """What keeps two ranks from working together; empty: nothing."""
    for name, advice in (
        ("versions", "install the same on every host"),
        ("options", "give every rank the same options"),
        ("weights", "give every rank the same checkpoint"),
    ):
        mine, theirs = getattr(first, name), getattr(other, name)
        if mine != theirs:
            return f"its {name} are not those of rank 0 ({theirs}, rank 0 has {mine}); {advice}"
    return ""
