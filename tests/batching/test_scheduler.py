"""The scheduler under any pressure: budgets hold, nobody starves, everything finishes, no token is lost."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii.batching.data_classes import EngineRequest
from mii.batching.scheduler import Plan, Scheduler, SchedulerLimits
from mii.engine.kv_cache import BlockPool
from mii.engine.sequence import Sequence


def sequence(uid: int, prompt: list[int], generate: int, switch: int = 0) -> Sequence:
    request = EngineRequest(uid=uid, prompt_ids=prompt, max_new_tokens=generate)
    return Sequence(request, len(prompt) + generate, switch=switch)


def next_token(uid: int, position: int) -> int:
    """What the stand-in for a model answers: as with sampling, only the request and the position decide."""
    return (uid * 31 + position * 7) % 5


@dataclass
class Device:
    """Stands in for the device: checks that what a plan reads was computed, gives tokens back `depth` steps late."""

    scheduler: Scheduler
    depth: int
    launched: deque[Plan] = field(default_factory=deque)
    # block -> whether it was computed as part of a long context, and the tokens up to its last one
    written: dict[int, tuple[bool, tuple[int, ...]]] = field(default_factory=dict)
    finished: dict[int, list[int]] = field(default_factory=dict)

    def text(self, seq: Sequence, end: int) -> list[int]:
        known = seq.tokens[:end]
        return known + [next_token(seq.uid, p) for p in range(len(known), end)]

    def launch(self, plan: Plan) -> None:
        size = self.scheduler.pool.block_size
        for chunk in plan.chunks:
            seq, tokens = chunk.sequence, self.text(chunk.sequence, chunk.start + chunk.size)
            for position in range(chunk.start, len(tokens)):
                block = seq.blocks[position // size]
                self.written[block] = seq.long, tuple(tokens[: position + 1])
            for index in range(len(tokens) // size):
                long, held = self.written[seq.blocks[index]]
                assert held[: (index + 1) * size] == tuple(tokens[: (index + 1) * size])
                assert long == seq.long
        self.launched.append(plan)

    def collect(self) -> None:
        for chunk in self.launched.popleft().chunks:
            seq = chunk.sequence
            if not chunk.samples or seq.uid in self.finished:
                continue
            seq.receive(next_token(seq.uid, len(seq.tokens)))
            if len(seq.tokens) >= seq.limit:
                self.scheduler.remove(seq)
                self.finished[seq.uid] = seq.tokens

    def run(self, limits: SchedulerLimits, steps: int = 20_000) -> None:
        for _ in range(steps):
            if not self.scheduler.has_work:
                return
            plan = self.scheduler.schedule()
            check_plan(plan, limits)
            if plan:
                self.launch(plan)
            while len(self.launched) > self.depth or (self.launched and not plan):
                self.collect()
        pytest.fail(f"{len(self.scheduler.waiting)} requests still wait after {steps} steps")


def check_plan(plan: Plan, limits: SchedulerLimits) -> None:
    assert sum(chunk.size for chunk in plan.chunks) == plan.num_tokens <= limits.max_tokens
    assert len(plan.chunks) <= limits.max_sequences
    planned = [chunk.sequence.uid for chunk in plan.chunks]
    assert len(set(planned)) == len(planned)
    assert not set(planned) & {seq.uid for seq in plan.preempted}
    for chunk in plan.chunks:
        assert chunk.size >= 1
        assert not chunk.sequence.outgrows(chunk.start + chunk.size)
        assert chunk.samples == (chunk.start + chunk.size == chunk.sequence.length - 1 * chunk.samples)


@st.composite
def workloads(draw: st.DrawFn) -> tuple[SchedulerLimits, BlockPool, list[Sequence], int]:
    size = draw(st.sampled_from([1, 2, 4, 8]))
    blocks = draw(st.integers(2, 30))
    capacity = size * blocks
    limits = SchedulerLimits(
        max_tokens=draw(st.integers(1, 40)),
        max_sequences=draw(st.integers(1, 8)),
        max_slots=8,
        reserve_blocks=draw(st.integers(0, 2)),
    )
    switch = draw(st.sampled_from([0, 0, 3, 11]))
    sequences = []
    for uid in range(draw(st.integers(1, 12))):
        prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=min(30, capacity - 1)))
        sequences.append(sequence(uid, prompt, draw(st.integers(1, min(20, capacity - len(prompt)))), switch))
    return limits, BlockPool(blocks, size, draw(st.booleans())), sequences, draw(st.sampled_from([0, 1]))


@settings(max_examples=400)
@given(workloads())
def test_everything_finishes_with_its_own_tokens_under_any_pressure(
    workload: tuple[SchedulerLimits, BlockPool, list[Sequence], int],
) -> None:
    limits, pool, sequences, depth = workload
    scheduler = Scheduler(limits, pool)
    device = Device(scheduler, depth)
    for seq in sequences:
        scheduler.add(seq)
    device.run(limits)
    assert len(device.finished) == len(sequences)
    for seq in sequences:
        expected = list(seq.request.prompt_ids)
        while len(expected) < seq.limit:
            expected.append(next_token(seq.uid, len(expected)))
        assert device.finished[seq.uid] == expected
    assert pool.num_free == pool.num_blocks
    assert scheduler.free_slots == limits.max_slots


@settings(max_examples=100)
@given(workloads())
def test_the_same_requests_give_the_same_plans(
    workload: tuple[SchedulerLimits, BlockPool, list[Sequence], int],
) -> None:
    limits, pool, sequences, _ = workload
    histories = []
    for _ in range(2):
        scheduler = Scheduler(limits, BlockPool(pool.num_blocks, pool.block_size, pool.prefix_caching))
        device = Device(scheduler, 0)
        for seq in sequences:
            scheduler.add(sequence(seq.uid, list(seq.request.prompt_ids), seq.request.max_new_tokens, seq.switch))
        history = []
        while scheduler.has_work:
            plan = scheduler.schedule()
            history.append([(c.sequence.uid, c.start, c.size, tuple(c.sequence.blocks)) for c in plan.chunks])
            if plan:
                device.launch(plan)
                device.collect()
        histories.append(history)
    assert histories[0] == histories[1]


def make(max_tokens: int = 16, blocks: int = 16, size: int = 4, **limits: int) -> Scheduler:
    return Scheduler(SchedulerLimits(max_tokens, limits.get("seqs", 8), 8), BlockPool(blocks, size))


def planned(plan: Plan) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.uid, chunk.start, chunk.size) for chunk in plan.chunks]


def test_a_step_is_filled_with_decodes_first_and_then_chunks() -> None:
    scheduler = make(max_tokens=10)
    scheduler.add(sequence(0, [1] * 3, 5))
    assert planned(scheduler.schedule()) == [(0, 0, 3)]
    scheduler.running[0].receive(1)
    scheduler.add(sequence(1, [2] * 25, 5))
    assert planned(scheduler.schedule()) == [(0, 3, 1), (1, 0, 9)]


def test_a_prompt_larger_than_the_free_blocks_starts_with_the_chunk_that_fits() -> None:
    scheduler = make(max_tokens=64, blocks=4)
    scheduler.add(sequence(0, [1] * 7, 2))
    scheduler.schedule()
    scheduler.add(sequence(1, [2] * 15, 1))
    assert planned(scheduler.schedule()) == [(0, 7, 1), (1, 0, 8)]


def test_a_common_prefix_is_computed_once_even_within_one_step() -> None:
    scheduler = make(max_tokens=64)
    scheduler.add(sequence(0, [1] * 13, 2))
    scheduler.add(sequence(1, [1] * 12 + [2], 2))
    plan = scheduler.schedule()
    assert planned(plan) == [(0, 0, 13), (1, 12, 1)]
    assert plan.chunks[0].sequence.blocks[:3] == plan.chunks[1].sequence.blocks[:3]
    assert scheduler.pool.hit_tokens == 12


def test_the_newest_running_sequence_gives_way_and_comes_back_first() -> None:
    scheduler = make(max_tokens=64, blocks=4)
    old, new = sequence(0, [1] * 8, 8), sequence(1, [2] * 7, 8)
    scheduler.add(old)
    scheduler.add(new)
    scheduler.schedule()
    scheduler.add(sequence(2, [3], 1))
    old.receive(5)
    new.receive(6)
    plan = scheduler.schedule()
    assert planned(plan) == [(0, 8, 1)]
    assert plan.preempted == [new]
    assert new.tokens == [2] * 7 + [6]
    assert scheduler.waiting[0] is new
