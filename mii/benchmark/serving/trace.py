"""One request as it went: when its pieces came, how many tokens were in each, how it ended."""

from __future__ import annotations

import itertools

import msgspec

__all__ = ["Failed", "Trace", "share_out"]


class Failed(Exception):
    """A request that has no complete answer.

    Args:
        kind: what errors are counted by, in a word or two.
        message: the server's words.
    """

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(message or kind)
        self.kind = kind


class Trace(msgspec.Struct):
    """Times are seconds of `time.monotonic`, which the processes of a machine share.

    Args:
        due: when the request was to be sent.
        new_tokens: tokens that were asked for.
        prompt_tokens: tokens of the prompt; what the server says counts more than what was planned.
        sent: when it was sent.
        ended: when the last of the answer came, or the error.
        times: when each piece of the answer came.
        counts: tokens in each piece.
        tokens: in all pieces.
        kind: the kind of error that it ended with; empty: it is complete.
        message: the error's words.
    """

    due: float
    new_tokens: int
    prompt_tokens: int
    sent: float = 0.0
    ended: float = 0.0
    times: list[float] = []
    counts: list[int] = []
    tokens: int = 0
    kind: str = ""
    message: str = ""

    def add(self, now: float, count: int) -> None:
        """A piece of so many tokens has come."""
        self.times.append(now)
        self.counts.append(count)
        self.tokens += count

    @property
    def first_seconds(self) -> float | None:
        """From when the request was to be sent to the first piece; None: nothing came."""
        return self.times[0] - self.due if self.times else None

    @property
    def token_seconds(self) -> float | None:
        """Time per token after the first piece; None: all came in one piece."""
        later = self.tokens - self.counts[0] if self.counts else 0
        return (self.times[-1] - self.times[0]) / later if later > 0 else None

    @property
    def seconds(self) -> float:
        """From when the request was to be sent to its end."""
        return self.ended - self.due

    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]


def share_out(total: int, weights: list[int]) -> list[int]:
    """A sum shared out by weights, in whole numbers and in order; the shares add up to the total.

    >>> share_out(5, [1, 1, 3])
    [1, 1, 3]
    >>> share_out(4, [2, 2, 2])
    [1, 1, 2]
    """
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    shares, seen, given = [], 0, 0
    for weight in weights:
        seen += weight
        upto = total * seen // whole
        shares.append(upto - given)
        given = upto
    return shares
