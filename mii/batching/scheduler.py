"""Dynamic SplitFuse: which tokens of which requests the next forward takes. Pure: no tensor, no clock, no randomness.

Every step fills one token budget. Sequences that decode come first, a token each; the rest of the budget goes to
prompts in the order they came, cut into chunks where they do not fit (SplitFuse, DeepSpeed-FastGen, arXiv 2401.08671).
Admission asks only whether the next chunk fits. When blocks run out, the newest running sequence gives up its own and
is computed again later; the oldest one is never interrupted, so everything finishes.

Every rank of a tensor-parallel group runs this on the same requests and comes to the same plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mii.batching.pace import Pace, TimeLeft
from mii.engine.kv_cache import BlockPool
from mii.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What one step may hold. Tokens and sequences a step, sequences with a slot, the free blocks kept for decoding,
    and the time that a token may take, where one is kept.
    """

    max_tokens: int
    max_sequences: int
    max_slots: int
    reserve_blocks: int = 0
    pace: Pace | None = None


class Chunk(NamedTuple):
    """`size` tokens of a sequence from `start` on; `samples` when they reach its end, so a next token is drawn."""

    sequence: Sequence
    start: int
    size: int
    samples: bool


@dataclass(slots=True)
class Plan:
    """One step: the sequences that decode, the chunks of prompts after them, and who lost its blocks for it.

    Hundreds of sequences decode in every step, so they are columns and no objects of their own.

    Args:
        decodes: Sequences that feed one token and sample the next one.
        lengths: How long the context of each of them then is.
        fed: The token that each of them feeds; -1: the one that it sampled last and only the device knows.
        prompts: Everything else, in rows after theirs.
        grown: Those of `decodes` that got a new block for it.
        preempted: Sequences that lost their blocks.
        time: What the pace leaves for prompts; None: as much as they take.
    """

    decodes: list[Sequence] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    prompts: list[Chunk] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0
    time: TimeLeft | None = None

    @property
    def chunks(self) -> list[Chunk]:
        """All rows in their order, as chunks: for what is done seldom."""
        decodes = zip(self.decodes, self.lengths, strict=True)
        return [*(Chunk(sequence, length - 1, 1, True) for sequence, length in decodes), *self.prompts]

    @property
    def num_sequences(self) -> int:
        return len(self.decodes) + len(self.prompts)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that a token is drawn for, in the order of their rows."""
        return [*self.decodes, *(chunk.sequence for chunk in self.prompts if chunk.samples)]

    def add(self, chunk: Chunk) -> None:
        self.prompts.append(chunk)
        self.num_tokens += chunk.size

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prompts)


class Scheduler:
    """Owns the queue, the running sequences, the slots and the block pool."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._free_slots = list(range(limits.max_slots - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def capacity(self) -> int:
        """Tokens that one sequence alone can hold."""
        return self.pool.num_blocks * self.pool.block_size

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a finished or aborted sequence out and frees what it holds."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._free(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> Plan:
        """Plans the next step and accounts for it: after this call the planned tokens count as computed."""
        plan = Plan()
        rest = self._plan_decodes(plan)
        if self.limits.pace is not None and plan.decodes:
            plan.time = self.limits.pace.left(len(plan.decodes), sum(plan.lengths))
        self._plan_chunks(plan, rest)
        self._unblock(plan)
        self._admit(plan)
        return plan

    def commit(self, sequence: Sequence, token: int) -> int:
        """Takes over a token that was sampled for `sequence` and read back; returns how many are known then."""
        sequence.in_flight -= 1
        sequence.tokens.append(token)
        known = len(sequence.tokens)
        if known % self.pool.block_size == 0:
            self._register(sequence)
        return known

    # -- sequences that a caller schedules by hand (the ragged interface) ---------------------------------------------

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def open(self, sequence: Sequence) -> None:
        """Gives a sequence a slot without queueing it."""
        sequence.slot, sequence.ticket = self._free_slots.pop(), object()

    def extend(self, plan: Plan, sequence: Sequence, tokens: list[int]) -> None:
        """Appends tokens to an opened sequence and plans all of them."""
        sequence.tokens += tokens
        self._plan(plan, sequence, len(tokens))
        sequence.in_flight = 0

    def close(self, sequence: Sequence) -> None:
        self._free(sequence)

    # -- the parts of a plan ----------------------------------------------------------------------------------

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """Plans a token of every sequence that decodes; returns those with more tokens to compute.

        The loop runs for each of hundreds of sequences in each step, so it calls nothing unless a block is full.
        """
        running, size = self.running, self.pool.block_size
        decodes, lengths, fed = plan.decodes, plan.lengths, plan.fed
        room = min(self.limits.max_tokens, self.limits.max_sequences)
        rest: list[Sequence] = []
        index = 0
        while index < len(running) and index - len(rest) < room:
            sequence = running[index]
            in_flight, computed = sequence.in_flight, sequence.computed
            length = len(sequence.tokens) + in_flight
            if sequence.switch and sequence.outgrown and length < sequence.limit:
                self._send_back(plan, sequence)
                continue
            if computed + 1 != length or length >= sequence.limit:
                rest.append(sequence)
                index += 1
                continue
            if computed >= len(sequence.blocks) * size and not self._grow(plan, sequence):
                continue  # it was preempted itself: the list is shorter now
            decodes.append(sequence)
            lengths.append(length)
            fed.append(-1 if in_flight else sequence.tokens[-1])
            sequence.computed = length
            sequence.in_flight = in_flight + 1
            if length % size == 0:
                self._register(sequence)
            index += 1
        plan.num_tokens = len(decodes)
        return rest

    def _grow(self, plan: Plan, sequence: Sequence) -> bool:
        """Gives a sequence its next block, preempting newer ones for it if need be. False: it had to give way."""
        while not self.pool.num_free:
            victim = self.running[-1]
            self._preempt(plan, victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        plan.grown.append(sequence)
        return True

    def _plan_chunks(self, plan: Plan, sequences: list[Sequence]) -> None:
        """Continues prompts that are already running, oldest first."""
        for sequence in sequences:
            if not self._has_room(plan):
                return
            if sequence.slot >= 0 and sequence.remaining > 1 and not sequence.complete:
                count = self._chunk(plan, sequence)
                if count:
                    self._plan(plan, sequence, count)

    def _unblock(self, plan: Plan) -> None:
        """When prompts hold all blocks and none can go on, the newest ones give theirs to the oldest."""
        while not plan and len(self.running) > 1 and any(s.remaining and not s.complete for s in self.running):
            self._preempt(plan, self.running[-1])
            self._plan_chunks(plan, self.running)

    def _admit(self, plan: Plan) -> None:
        """Starts waiting sequences in order, as long as a chunk of the first one fits."""
        while self.waiting and self._has_room(plan) and self._free_slots and not plan.preempted:
            sequence = self.waiting[0]
            if len(self.running) >= self.limits.max_sequences or sequence.in_flight:
                return
            if not self._keeps_pace(sequence) or not self._start(plan, sequence):
                return

    def _keeps_pace(self, sequence: Sequence) -> bool:
        """Whether tokens still come in time once this sequence decodes along."""
        pace, running = self.limits.pace, self.running
        return pace is None or pace.admits(len(running) + 1, sum(s.length for s in running) + sequence.length)

    def _start(self, plan: Plan, sequence: Sequence) -> bool:
        """Reuses the cached prefix and plans the first chunk; leaves everything as it was if nothing fits."""
        sequence.settle()
        size = self.pool.block_size
        whole = not self.pool.prefix_caching or sequence.prompt_scores is not None
        hashes = [] if whole else sequence.block_hashes(size, (sequence.length - 1) // size)
        cached = self.pool.match(hashes)
        spare = self.pool.num_free - self.pool.num_unused(cached)
        if self.running and spare <= self.limits.reserve_blocks:
            return False
        if spare < 1 or not self._in_time(plan, len(cached) * size, sequence.length):
            return False
        self.pool.take(cached)
        self.pool.queried_tokens += sequence.length
        self.pool.hit_tokens += len(cached) * size
        sequence.blocks = cached
        sequence.computed = sequence.registered = len(cached) * size
        sequence.slot, sequence.ticket = self._free_slots.pop(), object()
        self.waiting.popleft()
        self.running.append(sequence)
        self._plan(plan, sequence, self._chunk(plan, sequence))
        return True

    # -- accounting ---------------------------------------------------------------------------------------------------

    def _has_room(self, plan: Plan) -> bool:
        return plan.num_tokens < self.limits.max_tokens and plan.num_sequences < self.limits.max_sequences

    def _chunk(self, plan: Plan, sequence: Sequence) -> int:
        """How many of its remaining tokens the budget and the free blocks allow."""
        room = (len(sequence.blocks) + self.pool.num_free) * self.pool.block_size - sequence.computed
        count = min(sequence.remaining, self.limits.max_tokens - plan.num_tokens, room)
        return self._in_time(plan, sequence.computed, count)

    def _in_time(self, plan: Plan, start: int, count: int) -> int:
        """How many of `count` tokens of a prompt the pace allows in this step; the first one gets some in any case."""
        pace = self.limits.pace
        if pace is None or plan.time is None:
            return count
        least = 0 if plan.prompts else pace.least
        return min(count, max(least, plan.time.fitting(start)))

    def _plan(self, plan: Plan, sequence: Sequence, count: int) -> None:
        start = sequence.computed
        sequence.computed = start + count
        needed = self.pool.blocks_for(sequence.computed) - len(sequence.blocks)
        if needed > 0:
            sequence.blocks.extend(self.pool.allocate(needed))
        samples = sequence.computed == sequence.length
        if plan.time is not None:
            plan.time.take(count, start)
        plan.add(Chunk(sequence, start, count, samples))
        if start // self.pool.block_size != sequence.computed // self.pool.block_size:
            self._register(sequence)
        if samples:
            sequence.in_flight += 1

    def _register(self, sequence: Sequence) -> None:
        """Makes every block findable that is computed in full and whose tokens the host knows."""
        size = self.pool.block_size
        full = min(sequence.computed, len(sequence.tokens)) // size
        first = sequence.registered // size
        if not self.pool.prefix_caching or full <= first:
            return
        hashes = sequence.block_hashes(size, full)
        for index in range(first, full):
            self.pool.register(sequence.blocks[index], hashes[index])
        sequence.registered = full * size

    def _preempt(self, plan: Plan, sequence: Sequence) -> None:
        self._send_back(plan, sequence)
        self.preemptions += 1

    def _send_back(self, plan: Plan, sequence: Sequence) -> None:
        """Takes a running sequence's blocks; it goes back to the head of the queue and loses no token."""
        self.running.remove(sequence)
        self._free(sequence)
        sequence.computed = sequence.registered = 0
        self.waiting.appendleft(sequence)
        plan.preempted.append(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting
