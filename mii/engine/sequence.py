"""A request inside the engine: its tokens, how far they are computed, and the KV blocks that hold them."""

from __future__ import annotations

from collections.abc import Collection

from mii.batching.data_classes import EngineRequest, SamplingParams, TokenLogprob
from mii.engine.kv_cache import chain_hash
from mii.engine.slots import Slots


class Sequence:
    """One request's life in the engine.

    Three counts describe it at any time, `computed <= length` and `len(tokens) <= length`:
      * `tokens`: ids that the host knows, the prompt and what was generated and read back;
      * `in_flight`: tokens sampled on the device and not read back yet (at most one while the host is one step ahead);
      * `computed`: tokens whose keys and values are in the cache, or will be once the launched steps have run.

    While it decodes, all but its last token are computed, and its length is in a column of its slot
    (`mii.engine.slots`), where a step makes all sequences longer at once.
    """

    __slots__ = (
        "_computed",
        "_hashes",
        "_in_flight",
        "_slots",
        "blocks",
        "decodes",
        "limit",
        "long",
        "min_length",
        "own_ends",
        "prompt_length",
        "prompt_scores",
        "registered",
        "request",
        "salt",
        "slot",
        "special",
        "switch",
        "ticket",
        "tokens",
        "uid",
    )

    def __init__(
        self,
        request: EngineRequest,
        limit: int,
        salt: bytes | None = None,
        model_ends: Collection[int] = (),
        switch: int = 0,
    ) -> None:
        """`limit`: prompt plus generated tokens at most, from the request, the model and the size of the cache.
        `salt`: keeps blocks apart whose contents differ although their tokens do not; None for the usual case.
        `model_ends`: the tokens that every step can hold back in rows which may not end yet.
        `switch`: the length past which the model rotates all positions otherwise; 0 for none.
        """
        self.request = request
        self.uid = request.uid
        self.tokens = list(request.prompt_ids)
        self.prompt_length = len(self.tokens)
        self.limit = limit
        self.min_length = self.prompt_length + (request.min_new_tokens if request.stop_ids else 0)
        # Ends that are not the model's have to be held back by this request's own means.
        self.own_ends = self.min_length > self.prompt_length and set(request.stop_ids) != set(model_ends)
        # An entry for each token of the prompt, as far as it is known; None when it was given away or nobody asks.
        self.prompt_scores: list[TokenLogprob | None] | None = None
        if request.prompt_logprobs is not None and self.tokens:
            self.prompt_scores = [TokenLogprob(self.tokens[0], None), *[None] * (self.prompt_length - 1)]
        # Whether steps have more to do for it than to draw a token from the model's logits.
        self.special = (
            self.own_ends
            or request.sampling.changes_logits
            or request.logprobs is not None
            or self.prompt_scores is not None
        )
        self._computed = self._in_flight = 0  # while it does not decode
        self.decodes = False  # from the step on that computes all that exists of it
        self.registered = 0  # tokens whose full blocks the pool can find
        self._slots: Slots | None = None
        self.slot = -1
        self.ticket = 0  # a new one each time a slot and blocks are given to it
        self.blocks: list[int] = []
        self.salt = salt
        self._hashes: list[bytes] = []
        self.switch = switch
        self.long = False  # whether it is computed as a context longer than `switch`
        self.settle()

    @property
    def length(self) -> int:
        """Tokens that exist: known to the host or still on the device."""
        if self.decodes and self._slots is not None:
            return self._slots.length.item(self.slot)
        return len(self.tokens) + self._in_flight

    @property
    def in_flight(self) -> int:
        return self.length - len(self.tokens)

    @property
    def computed(self) -> int:
        return self.length - 1 if self.decodes else self._computed

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

    @property
    def outgrown(self) -> bool:
        """Whether what is computed of it is of no use any more: it has grown longer than `switch`."""
        return self.outgrows(self.length)

    def outgrows(self, length: int) -> bool:
        """Whether it would be outgrown with `length` tokens."""
        return not self.long and 0 < self.switch < length

    def settle(self, length: int | None = None) -> None:
        """Called while nothing of it is computed: it is long from now on if its length, or one that it is about to get,
        is above `switch`.
        """
        if self.outgrows(self.length if length is None else length):
            self.long, self.salt, self._hashes = True, b"long", []

    def edits(self, length: int) -> bool:
        """Whether the token after the first `length` is drawn from logits that are not the model's own."""
        return self.sampling.changes_logits or (self.own_ends and length < self.min_length)

    def take_prompt_scores(self) -> list[TokenLogprob] | None:
        """The entries of all the prompt's tokens, once they are there: with its first new token. Later None."""
        scores, self.prompt_scores = self.prompt_scores, None
        return None if scores is None else [entry for entry in scores if entry is not None]

    # -- in a slot ----------------------------------------------------------------------------------------------------

    def open(self, slots: Slots) -> None:
        """Takes a slot; nothing of it is computed yet."""
        self._slots, (self.slot, self.ticket) = slots, slots.take()
        slots.length[self.slot], slots.event[self.slot] = self.length, 0
        slots.comment[self.slot] = 0 if self.special else self.limit
        slots.may_end[self.slot] = min(self.min_length, self.limit)
        if self.min_length > self.length:
            slots.held.add(self.slot)

    def close(self) -> None:
        """Gives the slot back: nothing of it is computed any more; what the device has not told yet still comes."""
        assert self._slots is not None
        self._slots.give_back(self.slot)
        in_flight = self.in_flight
        self.restart()
        self._in_flight = in_flight

    def hold(self, blocks: list[int], block_size: int) -> None:
        """Gets further blocks."""
        self.blocks += blocks
        if self.decodes:
            self._foresee(block_size)

    def compute(self, count: int) -> None:
        """So many tokens more of those that exist are computed."""
        self._computed += count

    def decode(self, block_size: int) -> None:
        """All of it is computed and its next token drawn: from now on it decodes."""
        assert self._slots is not None
        self._slots.length[self.slot] = self.length + 1
        self.decodes = True
        self._foresee(block_size)

    def _foresee(self, block_size: int) -> None:
        """Notes at which length it can not just go on: its blocks hold all but its last token."""
        assert self._slots is not None
        event = min(self.limit, len(self.blocks) * block_size + 1)
        if self.switch and not self.long:
            event = min(event, self.switch + 1)
        self._slots.event[self.slot] = event

    def receive(self, token: int) -> None:
        """Takes in a token that was in flight."""
        self.tokens.append(token)
        if not self.decodes:
            self._in_flight -= 1

    def restart(self) -> None:
        """Back to the state of a sequence that waits: nothing computed, nothing held; no known token is lost."""
        self._computed = self._in_flight = self.registered = 0
        self.decodes, self._slots, self.slot, self.blocks = False, None, -1, []

    def block_hashes(self, block_size: int, blocks: int) -> list[bytes]:
        """The chained hashes of the first `blocks` full blocks of known tokens, computed once each."""
        for index in range(len(self._hashes), min(blocks, len(self.tokens) // block_size)):
            parent = self._hashes[-1] if self._hashes else self.salt
            self._hashes.append(chain_hash(parent, self.tokens[index * block_size : (index + 1) * block_size]))
        return self._hashes[:blocks]
