"""Pieces of one call's answers on their way to a reader, who may be slow: what is not taken is merged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from mii.grpc_related.pacer import Pacer
from mii.grpc_related.proto.modelresponse_pb2 import SingleGenerationReply

__all__ = ["Answers", "Piece", "merged", "parted", "runs"]

Piece: TypeAlias = SingleGenerationReply
"""An answer, or a part of one: text in `response`, and the `index` of its prompt."""

_MOST_PIECES = 16  # more are merged, so that what waits grows with the text and not with the number of pieces
_RUNNING = ("", "none")


class Answers:
    """What has come and was not taken yet.

    Args:
        parts: of the call, each of which ends by itself.
        pacer: gives the reader its turns; None: it may take what comes at once.
    """

    def __init__(self, parts: int, pacer: Pacer | None = None) -> None:
        self.started = False
        """Whether anything has come."""
        self._parts, self._pacer = parts, pacer
        self._pieces: list[Piece] = []
        self._most = _MOST_PIECES
        self._failure: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._tell: Callable[[], object] | None = None
        self._offer: Callable[[Sequence[Piece]], bool] | None = None
        self._asked = False

    @property
    def over(self) -> bool:
        """Whether everything was taken."""
        return not self._pieces and not self._parts

    def listen(self, tell: Callable[[], object] | None, offer: Callable[[Sequence[Piece]], bool] | None = None) -> None:
        """Has `tell` called, in place of a reader who waits in `take`, whenever there is something to `take_now` or all
        has come. What comes while nothing waits is given to `offer`, where there is one, and waits if that returns
        False.
        """
        self._tell, self._offer = tell, offer
        if tell is not None:
            tell()

    def push(self, pieces: Sequence[Piece]) -> None:
        """Takes in what has come."""
        self.started = True
        if self._offer is not None and not self._pieces and self._offer(pieces):
            return
        self._pieces.extend(pieces)
        if len(self._pieces) > self._most:
            self._pieces = merged(self._pieces)
            self._most = max(_MOST_PIECES, 2 * len(self._pieces))
        if self._tell is not None:
            self._tell()
        elif self._reader is not None:
            self._call_reader()

    def end_part(self) -> None:
        """A part of the call is complete, or as complete as it will ever be."""
        self._parts -= 1
        if not self._parts and self._pieces:
            # A piece keeps the whole message alive that it came in, and who reads late may leave it here for long.
            self._pieces = merged(self._pieces)
        self._wake()

    def fail(self, error: Exception) -> None:
        """The reader gets `error` at once."""
        self._failure = self._failure or error
        self._wake()

    async def take(self) -> list[Piece]:
        """What has come since the last time, once something has; nothing once everything was taken.

        Raises:
            Exception: what `fail` was given.
        """
        while self._failure is None and (self._pieces or self._parts):
            if self._pieces and self._pacer is None:
                break
            await self._wait()
            if self._pieces:
                break
        return self.take_now()

    def take_now(self) -> list[Piece]:
        """What has come since the last time; may be nothing.

        Raises:
            Exception: what `fail` was given.
        """
        if self._failure is not None:
            raise self._failure
        pieces, self._pieces = self._pieces, []
        return pieces

    async def _wait(self) -> None:
        self._reader = asyncio.get_running_loop().create_future()
        if self._pieces:
            self._call_reader()
        try:
            await self._reader
        finally:
            self._reader = None

    def _call_reader(self) -> None:
        """Something is there for a reader who waits."""
        if self._pacer is None:
            self._wake()
        elif not self._asked:
            self._asked = True
            self._pacer.ask(self._turn)

    def _turn(self) -> None:
        self._asked = False
        self._wake()

    def _wake(self) -> None:
        if self._tell is not None:
            self._tell()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def runs(piece: Piece) -> bool:
    """Whether the piece is not the last one of its answer."""
    return piece.finish_reason in _RUNNING and not piece.error


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with one piece for each answer that runs, and a last one, as it came, for each that has ended."""
    running, last = parted(pieces)
    return running + last


def parted(pieces: Iterable[Piece]) -> tuple[list[Piece], list[Piece]]:
    """As `merged`: the pieces of answers that run, and the last ones."""
    running: dict[int, list[Piece]] = {}
    last: list[Piece] = []
    for piece in pieces:
        if runs(piece):
            running.setdefault(piece.index, []).append(piece)
        else:
            last.append(_joined([piece]))
    return [_joined(parts) for parts in running.values()], last


def _joined(parts: Sequence[Piece]) -> Piece:
    whole = Piece()
    for part in parts:  # lists grow, and of everything else the latest stays
        whole.MergeFrom(part)
    if len(parts) > 1:
        whole.response = "".join([part.response for part in parts])
    return whole
