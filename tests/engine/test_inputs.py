"""The columns that a step's copy carries: what a plan says, row by row."""

from __future__ import annotations

import numpy as np
import torch

from mii.batching.data_classes import EngineRequest
from mii.batching.scheduler import Chunk, Plan, Scheduler, SchedulerLimits
from mii.engine.inputs import SentBlocks, fill_step
from mii.engine.kv_cache import BlockPool
from mii.engine.sequence import Sequence
from mii.ops import abi
from mii.ops.staging import Staging, StepLayout


def scheduler(lengths: list[int], max_tokens: int = 64) -> Scheduler:
    made = Scheduler(SchedulerLimits(max_tokens, 16, 16), BlockPool(64, 4))
    for uid, length in enumerate(lengths):
        request = EngineRequest(uid=uid, prompt_ids=[10 * uid + place for place in range(length)], max_new_tokens=20)
        made.add(Sequence(request, length + 20))
    return made


def check(plan: Plan) -> None:
    """Against the chunks, read one at a time."""
    host = Staging(StepLayout(16, 64, 64), torch.device("cpu")).host()
    for column in (host.seq_slot, host.q_start, host.kv_len, host.host_ids, host.sample_seq):
        column.fill(-7)
    samples = fill_step(host, plan)
    ids: list[int] = []
    for row, chunk in enumerate(plan.chunks):
        assert host.seq_slot[row] == chunk.sequence.slot
        assert host.kv_len[row] == chunk.start + chunk.size
        assert host.q_start[row] == len(ids)
        known = chunk.sequence.tokens[chunk.start : chunk.start + chunk.size]
        ids += [-1] if row < len(plan.decodes) else known  # -1: what the device sampled last
    assert host.q_start[len(plan.chunks)] == len(ids) == plan.num_tokens
    assert host.host_ids[: len(ids)].tolist() == ids
    sampling = [row for row, chunk in enumerate(plan.chunks) if chunk.samples]
    assert host.sample_seq[:samples].tolist() == sampling
    assert host.counts[: abi.NUM_SAMPLES + 1].tolist() == [len(plan.chunks), len(ids), samples]
    assert [plan.chunks[row].sequence for row in sampling] == plan.sampled
    assert np.all(host.host_ids[len(ids) :] == -7)


def test_columns_say_what_the_chunks_say() -> None:
    made = scheduler([5, 9, 1, 70, 3])
    pending: list[Plan] = []
    for _ in range(30):
        plan = made.schedule()
        check(plan)
        pending.append(plan)
        if len(pending) > 1:  # tokens come one step late, so some rows feed what only the device knows
            for sequence in pending.pop(0).sampled:
                sequence.receive(1)
        if len(made.waiting) == 0 and len(made.running) < 5:
            break


def test_a_sequence_that_left_one_token_of_its_prompt_feeds_that_token() -> None:
    made = scheduler([9], max_tokens=8)
    check(made.schedule())
    plan = made.schedule()
    assert plan.prompts == [Chunk(made.running[0], 8, 1, True)]
    check(plan)
    plan = made.schedule()
    assert plan.decodes == made.running
    check(plan)


def test_every_block_is_sent_once_and_all_of_them_to_a_new_owner() -> None:
    made, sent = scheduler([6, 3]), SentBlocks(16)
    seen: dict[tuple[int, int], int] = {}
    for step in range(12):
        plan = made.schedule()
        updates, started = sent.updates(plan)
        assert len(started) == (2 if step == 0 else 0)
        for slot, index, block in updates:
            assert (slot, index) not in seen
            seen[slot, index] = block
        for sequence in plan.sampled:
            assert [seen[sequence.slot, index] for index in range(len(sequence.blocks))] == sequence.blocks
            sequence.receive(1)
    sequence = made.running[0]
    made.remove(sequence)
    sequence.restart()
    made.add(sequence)
    updates, started = sent.updates(made.schedule())
    assert started == [sequence]
    assert [block for slot, _, block in updates if slot == sequence.slot] == sequence.blocks
