"""A request inside the engine: its tokens, how far they are computed, and the KV blocks that hold them."""

from __future__ import annotations

from mii.batching.data_classes import EngineRequest, SamplingParams
from mii.engine.kv_cache import chain_hash


class Sequence:
    """One request's life in the engine.

    Three counts describe it at any time, `computed <= length` and `len(tokens) <= length`:
      * `tokens`: ids that the host knows, the prompt and what was generated and read back;
      * `in_flight`: tokens sampled on the device and not read back yet (at most one while the host is one step ahead);
      * `computed`: tokens whose keys and values are in the cache, or will be once the launched steps have run.
    """

    __slots__ = (
        "_hashes",
        "blocks",
        "computed",
        "in_flight",
        "limit",
        "min_length",
        "prompt_length",
        "registered",
        "request",
        "salt",
        "slot",
        "ticket",
        "tokens",
        "uid",
    )

    def __init__(self, request: EngineRequest, limit: int, salt: bytes | None = None) -> None:
        """`limit`: prompt plus generated tokens at most, from the request, the model and the size of the cache.
        `salt`: keeps blocks apart whose contents differ although their tokens do not; None for the usual case.
        """
        self.request = request
        self.uid = request.uid
        self.tokens = list(request.prompt_ids)
        self.prompt_length = len(self.tokens)
        self.limit = limit
        self.min_length = self.prompt_length + request.min_new_tokens
        self.computed = 0
        self.in_flight = 0
        self.registered = 0  # tokens whose full blocks the pool can find
        self.slot = -1
        self.ticket = object()  # a new one each time a slot and blocks are given to it
        self.blocks: list[int] = []
        self.salt = salt
        self._hashes: list[bytes] = []

    @property
    def length(self) -> int:
        """Tokens that exist: known to the host or still on the device."""
        return len(self.tokens) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens that exist and are not computed: 1 while decoding, more for a prompt or after a preemption."""
        return self.length - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def complete(self) -> bool:
        """True when every token it may have exists; it then only waits for the last ones to be read."""
        return self.length >= self.limit

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    def restart(self) -> None:
        """Back to the state of a sequence that waits: nothing computed, nothing held; no known token is lost."""
        self.computed = self.registered = self.in_flight = 0
        self.slot, self.blocks = -1, []

    def block_hashes(self, block_size: int, blocks: int) -> list[bytes]:
        """The chained hashes of the first `blocks` full blocks of known tokens, computed once each."""
        for index in range(len(self._hashes), min(blocks, len(self.tokens) // block_size)):
            parent = self._hashes[-1] if self._hashes else self.salt
            self._hashes.append(chain_hash(parent, self.tokens[index * block_size : (index + 1) * block_size]))
        return self._hashes[:blocks]
