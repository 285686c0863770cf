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
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

from mii.batching.pace import Pace, TimeLeft
from mii.engine.kv_cache import BlockPool
from mii.engine.sequence import Sequence
from mii.engine.slots import Column, Mask, Slots


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


_NO_ROWS, _NO_TICKETS = np.zeros(0, np.int32), np.zeros(0, np.int64)


def _no_rows() -> Column:
    return _NO_ROWS


@dataclass(slots=True)
class Plan:
    """One step: the sequences that decode, the chunks of prompts after them, and who lost its blocks for it.

    Hundreds of sequences decode in every step, so they are columns and no objects of their own.

    Args:
        decodes: Sequences that feed the token that they sampled last, and sample the next one.
        slots: Theirs.
        lengths: How long the context of each of them then is.
        held: Which of them may not end with this step; None: all of them may.
        prompts: Everything else, in rows after theirs.
        grown: Those of `decodes` that got a new block for it.
        preempted: Sequences that lost their blocks.
        reuses: Whether a sequence starts on cached blocks, which another one may be about to compute in this step.
        time: What the pace leaves for prompts; None: as much as they take.
        sampled: The sequences that a token is drawn for, in the order of their rows.
        sampled_slots, tickets, known: Their slots, the tickets of these, and how many tokens they have with that one.
    """

    decodes: list[Sequence] = field(default_factory=list)
    slots: Column = field(default_factory=_no_rows)
    lengths: Column = field(default_factory=_no_rows)
    held: Mask | None = None
    prompts: list[Chunk] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0
    reuses: bool = False
    time: TimeLeft | None = None
    sampled: list[Sequence] = field(default_factory=list)
    sampled_slots: Column = field(default_factory=_no_rows)
    tickets: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: _NO_TICKETS)
    known: Column = field(default_factory=_no_rows)

    @property
    def chunks(self) -> list[Chunk]:
        """All rows in their order, as chunks: for what is done seldom."""
        decodes = zip(self.decodes, self.lengths.tolist(), strict=True)
        return [*(Chunk(sequence, length - 1, 1, True) for sequence, length in decodes), *self.prompts]

    @property
    def num_sequences(self) -> int:
        return len(self.decodes) + len(self.prompts)

    def add(self, chunk: Chunk) -> None:
        self.prompts.append(chunk)
        self.num_tokens += chunk.size

    def finish(self, slots: Slots) -> None:
        """Everything is planned: notes what is needed when the tokens come."""
        self.sampled, self.sampled_slots, self.known = self.decodes, self.slots, self.lengths + 1
        last = [chunk for chunk in self.prompts if chunk.samples]
        if last:
            self.sampled = [*self.decodes, *(chunk.sequence for chunk in last)]
            rows = [(chunk.sequence.slot, chunk.start + chunk.size + 1) for chunk in last]
            more = np.array(rows, np.int32)
            self.sampled_slots = np.concatenate([self.slots, more[:, 0]])
            self.known = np.concatenate([self.known, more[:, 1]])
        self.tickets = slots.ticket.take(self.sampled_slots)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prompts)


class Scheduler:
    """Owns the queue, the running sequences, the slots and the block pool."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.slots = Slots(limits.max_slots)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._rows = np.zeros(limits.max_slots, np.int32)  # the slots of `running`, in its order
        self.preemptions = 0

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
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> Plan:
        """Plans the next step and accounts for it: after this call the planned tokens count as computed."""
        plan = Plan()
        rest = self._plan_decodes(plan)
        if self.limits.pace is not None and plan.decodes:
            plan.time = self.limits.pace.left(len(plan.decodes), int(plan.lengths.sum()))
        self._plan_chunks(plan, rest)
        self._unblock(plan)
        self._admit(plan)
        plan.finish(self.slots)
        return plan

    # -- sequences that a caller schedules by hand (the ragged interface) ---------------------------------------------

    @property
    def free_slots(self) -> int:
        return self.slots.num_free

    def open(self, sequence: Sequence) -> None:
        """Gives a sequence a slot without queueing it."""
        sequence.open(self.slots)

    def extend(self, plan: Plan, sequence: Sequence, tokens: list[int]) -> None:
        """Appends tokens to an opened sequence and plans all of them."""
        sequence.tokens += tokens
        self._compute(plan, sequence, len(tokens))

    def close(self, sequence: Sequence) -> None:
        self._free(sequence)

    # -- the parts of a plan ----------------------------------------------------------------------------------

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """Plans a token of every sequence that decodes; returns those with more tokens to compute."""
        rest: list[Sequence] = []
        rows = self._rows[: len(self.running)]
        lengths = self.slots.length.take(rows)
        ready = lengths < self.slots.event.take(rows)
        if np.count_nonzero(ready) < len(rows):
            rest = self._attend(plan, np.flatnonzero(~ready).tolist())
            rows = self._rows[: len(self.running)]
            lengths = self.slots.length.take(rows)
            ready = lengths < self.slots.event.take(rows)
        if len(rows) > self.limits.max_tokens:
            ready[np.flatnonzero(ready)[self.limits.max_tokens :]] = False
        plan.decodes = list(compress(self.running, ready.tobytes()))
        rows, lengths = rows[ready], lengths[ready]
        plan.slots, plan.lengths, plan.num_tokens = rows, lengths, len(rows)
        self.slots.length[rows] = lengths + 1
        if self.slots.held:
            plan.held = lengths < self.slots.may_end.take(rows)
        return rest

    def _attend(self, plan: Plan, indices: list[int]) -> list[Sequence]:
        """Looks at running sequences that can not just go on: new blocks for those whose blocks are full, and a new
        start for those that have outgrown what is computed of them. Returns those that do not decode yet.
        """
        rest: list[Sequence] = []
        out = 0
        for index, sequence in [(index, self.running[index]) for index in indices]:
            if index - out >= self.limits.max_tokens or sequence.slot < 0:
                break  # there is no room for it, or it was preempted, and so are all after it
            out += 1
            if sequence.outgrown and not sequence.complete:
                self._send_back(plan, sequence)
            elif not sequence.decodes:
                rest.append(sequence)
            elif not sequence.complete:
                out -= self._grow(plan, sequence)
        return rest

    def _grow(self, plan: Plan, sequence: Sequence) -> bool:
        """Gives a sequence its next block, preempting newer ones for it if need be. False: it had to give way."""
        while not self.pool.num_free:
            victim = self.running[-1]
            self._preempt(plan, victim)
            if victim is sequence:
                return False
        self._register(sequence)
        sequence.hold(self.pool.allocate(1), self.pool.block_size)
        plan.grown.append(sequence)
        return True

    def _plan_chunks(self, plan: Plan, sequences: list[Sequence]) -> None:
        """Continues prompts that are already running, oldest first."""
        for sequence in sequences:
            if not self._has_room(plan):
                return
            if sequence.slot >= 0 and not sequence.decodes:
                count = self._chunk(plan, sequence)
                if count:
                    self._plan(plan, sequence, count)

    def _unblock(self, plan: Plan) -> None:
        """When prompts hold all blocks and none can go on, the newest ones give theirs to the oldest."""
        while not plan and len(self.running) > 1 and any(not s.complete for s in self.running):
            self._preempt(plan, self.running[-1])
            self._plan_chunks(plan, self.running)

    def _admit(self, plan: Plan) -> None:
        """Starts waiting sequences in order, as long as a chunk of the first one fits."""
        while self.waiting and self._has_room(plan) and self.free_slots and not plan.preempted:
            sequence = self.waiting[0]
            if len(self.running) >= self.limits.max_sequences or sequence.in_flight:
                return
            if not self._keeps_pace(sequence) or not self._start(plan, sequence):
                return

    def _keeps_pace(self, sequence: Sequence) -> bool:
        """Whether tokens still come in time once this sequence decodes along."""
        pace, running = self.limits.pace, len(self.running)
        if pace is None:
            return True
        return pace.admits(running + 1, int(self.slots.length[self._rows[:running]].sum()) + sequence.length)

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
        self.waiting.popleft()
        self._enter(sequence)
        sequence.hold(cached, size)
        sequence.compute(len(cached) * size)
        sequence.registered = sequence.computed
        plan.reuses = plan.reuses or bool(cached)
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
        """Plans the next tokens of a sequence of the queue, which decodes from then on if they reach its end."""
        if self._compute(plan, sequence, count):
            sequence.decode(self.pool.block_size)

    def _compute(self, plan: Plan, sequence: Sequence, count: int) -> bool:
        """Plans the next tokens of a sequence; whether they reach its end."""
        start, size = sequence.computed, self.pool.block_size
        sequence.compute(count)
        needed = self.pool.blocks_for(start + count) - len(sequence.blocks)
        if needed > 0:
            sequence.hold(self.pool.allocate(needed), size)
        samples = start + count == sequence.length
        if plan.time is not None:
            plan.time.take(count, start)
        plan.add(Chunk(sequence, start, count, samples))
        if start // size != (start + count) // size:
            self._register(sequence)
        return samples

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
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        plan.preempted.append(sequence)

    def _enter(self, sequence: Sequence) -> None:
        sequence.open(self.slots)
        self._rows[len(self.running)] = sequence.slot
        self.running.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        rows = self._rows[: len(self.running)]
        index = int(np.flatnonzero(rows == sequence.slot)[0])
        rows[index:-1] = rows[index + 1 :].copy()
        del self.running[index]
        self._register(sequence)
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.close()

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting
