"""Which replica gets a prompt: the one with the least work before it, or the one that has the prompt's beginning in its
cache unless that is much busier.

Work is counted in outstanding tokens, those of the prompts and those that may be generated, as the load balancer can
guess them. Which replica has which beginning is remembered from where prompts went, in pieces of fixed length; the
remedy against remembering wrongly (the replica has dropped it) is that it costs no more than a prompt that is new.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from mii.grpc_related.proto.modelresponse_pb2 import MultiStringRequest

__all__ = ["Candidate", "PrefixMap", "Work", "choose", "read_work"]

_PIECE_CHARACTERS = 256
_PIECE_IDS = 64
_MOST_PIECES = 64  # longer beginnings count as long as this
_CHARACTERS_A_TOKEN = 4
_ASSUMED_NEW_TOKENS = 256  # where a call has no max_new_tokens

# Beyond this a replica is much busier than the least busy one: half more, and a multiple of what the cache saves.
_BUSIER = 1.5
_WORTH = 4


class Work:
    """What is known of one prompt before it is tokenised.

    Args:
        cost: tokens, about.
        keys: one for each piece of its beginning; equal for equal beginnings.
    """

    __slots__ = ("cost", "keys")

    def __init__(self, cost: int, keys: Sequence[int]) -> None:
        self.cost, self.keys = cost, keys


def read_work(request: MultiStringRequest) -> list[Work]:
    """The work of each prompt of a call, in the order of `mii.grpc_related.convert.prompts_of`."""
    new_tokens = request.query_kwargs["max_new_tokens"].ivalue if "max_new_tokens" in request.query_kwargs else 0
    answer = new_tokens if new_tokens > 0 else _ASSUMED_NEW_TOKENS
    texts = [
        Work(len(text) // _CHARACTERS_A_TOKEN + answer, _keys(text, _PIECE_CHARACTERS)) for text in request.request
    ]
    tokens = [Work(len(ids.ids) + answer, _keys(tuple(ids.ids), _PIECE_IDS)) for ids in request.token_prompts]
    return texts + tokens


def _keys(prompt: str | tuple[int, ...], piece: int) -> list[int]:
    """Chained hashes of the whole pieces at the beginning."""
    keys, key = [], 0
    for end in range(piece, min(len(prompt), piece * _MOST_PIECES) + 1, piece):
        key = hash((key, prompt[end - piece : end]))
        keys.append(key)
    return keys


class PrefixMap:
    """Which replicas have been given which beginnings.

    Args:
        capacity: pieces to remember; those not seen for longest are forgotten.
    """

    def __init__(self, capacity: int = 1 << 16) -> None:
        self._capacity = capacity
        self._holders: OrderedDict[int, int] = OrderedDict()  # key of a beginning: a bit for each replica

    def __len__(self) -> int:
        return len(self._holders)

    def match(self, keys: Sequence[int]) -> dict[int, int]:
        """How many pieces of a beginning each replica has; those that have none are left out."""
        matches: dict[int, int] = {}
        everyone = -1
        for count, key in enumerate(keys, 1):
            everyone &= self._holders.get(key, 0)
            if not everyone:
                break
            bits = everyone
            while bits:
                lowest = bits & -bits
                matches[lowest.bit_length() - 1] = count
                bits ^= lowest
        return matches

    def record(self, keys: Sequence[int], replica: int) -> None:
        """A prompt with this beginning goes to `replica`."""
        for key in keys:
            self._holders[key] = self._holders.get(key, 0) | 1 << replica
            self._holders.move_to_end(key)
        while len(self._holders) > self._capacity:
            self._holders.popitem(last=False)

    def forget(self, replica: int) -> None:
        """The cache of `replica` is empty."""
        left = {key: holders & ~(1 << replica) for key, holders in self._holders.items()}
        self._holders = OrderedDict((key, holders) for key, holders in left.items() if holders)


class Candidate(Protocol):
    """A replica that may be chosen."""

    index: int
    tokens: int
    """Outstanding work."""


_C = TypeVar("_C", bound=Candidate)


def choose(candidates: Iterable[_C], work: Work, prefixes: PrefixMap, planned: dict[int, int]) -> _C:
    """The replica for a prompt.

    Args:
        candidates: at least one.
        work: the prompt.
        prefixes: who has which beginning.
        planned: tokens on top of each replica's outstanding ones, by its index.
    """

    def load(candidate: _C) -> int:
        return candidate.tokens + planned.get(candidate.index, 0)

    given = list(candidates)
    least = min(given, key=load)
    matches = prefixes.match(work.keys) if len(given) > 1 else {}
    holders = [candidate for candidate in given if candidate.index in matches]
    if not holders:
        return least
    best = min(holders, key=lambda candidate: (-matches[candidate.index], load(candidate)))
    saved = matches[best.index] * _PIECE_IDS - matches.get(least.index, 0) * _PIECE_IDS
    return best if load(best) <= load(least) * _BUSIER + _WORTH * saved else least
