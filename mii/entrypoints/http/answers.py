"""Pieces of one call's answers on their way to a reader, who may be slow: what is not taken is merged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias

from mii.grpc_related.proto.modelresponse_pb2 import SingleGenerationReply

__all__ = ["Answers", "Piece"]

Piece: TypeAlias = SingleGenerationReply
"""An answer, or a part of one: text in `response`, and the `index` of its prompt."""

_MOST_PIECES = 64  # more are merged, so that what waits grows with the text and not with the number of pieces


class Answers:
    """What has come and was not taken yet.

    Args:
        count: prompts of the call.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.started = False
        """Whether anything has come."""
        self._open = count
        self._pieces: list[Piece] = []
        self._most = _MOST_PIECES
        self._failure: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def push(self, pieces: Sequence[Piece]) -> None:
        """Takes in what has come."""
        self.started = True
        self._pieces.extend(pieces)
        if len(self._pieces) > self._most:
            self._pieces = merged(self._pieces)
            self._most = max(_MOST_PIECES, 2 * len(self._pieces))
        self._wake()

    def end_one(self) -> None:
        """One answer is complete, or as complete as it will ever be."""
        self._open -= 1
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
        while not self._pieces and self._open and self._failure is None:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._failure is not None:
            raise self._failure
        pieces, self._pieces = self._pieces, []
        return pieces

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with one piece for each answer that runs, and a last one, as it came, for each that has ended."""
    running: dict[int, list[Piece]] = {}
    last: list[Piece] = []
    for piece in pieces:
        if piece.finish_reason in ("", "none"):
            running.setdefault(piece.index, []).append(piece)
        else:
            last.append(piece)
    return [_joined(parts) for parts in running.values()] + last


def _joined(parts: Sequence[Piece]) -> Piece:
    whole = Piece()
    whole.CopyFrom(parts[-1])
    whole.response = "".join(part.response for part in parts)
    for name in ("logprobs", "prompt_logprobs"):
        whole.ClearField(name)
        for part in parts:
            getattr(whole, name).extend(getattr(part, name))
    return whole
