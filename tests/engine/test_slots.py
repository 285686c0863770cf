"""Columns of slots: what they say is what the sequences say, and nothing is looked at one by one without a cause."""

from __future__ import annotations

import itertools

import pytest

from mii.batching.data_classes import EngineRequest
from mii.batching.scheduler import Plan, Scheduler, SchedulerLimits
from mii.engine.kv_cache import BlockPool
from mii.engine.sequence import Sequence
from mii.engine.slots import Slots

BLOCK = 8


def sequence(uid: int, prompt: int, answer: int, min_new_tokens: int = 0) -> Sequence:
    request = EngineRequest(
        uid=uid, prompt_ids=[uid] * prompt, max_new_tokens=answer, min_new_tokens=min_new_tokens, stop_ids=(2,)
    )
    return Sequence(request, prompt + answer, model_ends=(2,))


def scheduler(*sequences: Sequence, blocks: int = 64) -> Scheduler:
    made = Scheduler(SchedulerLimits(64, 16, 16), BlockPool(blocks, BLOCK))
    for each in sequences:
        made.add(each)
    return made


def step(made: Scheduler) -> Plan:
    """A step whose tokens are read at once."""
    plan = made.schedule()
    for each in plan.sampled:
        each.receive(1)
        if len(each.tokens) >= each.limit:
            made.remove(each)
    return plan


def test_columns_and_sequences_count_alike_step_by_step() -> None:
    made = scheduler(sequence(0, 5, 30), sequence(1, 40, 3), sequence(2, 16, 20), sequence(3, 1, 40))
    behind: list[Plan] = []
    while made.has_work:
        plan = made.schedule()
        behind.append(plan)
        for each, length in zip(plan.decodes, plan.lengths.tolist(), strict=True):
            assert each.decodes
            assert each.computed == length == each.length - 1
            assert each.length == len(each.tokens) + each.in_flight == made.slots.length[each.slot]
            assert len(each.blocks) == made.pool.blocks_for(length)
        known = [len(each.tokens) + each.in_flight for each in plan.sampled]
        assert plan.known.tolist() == known
        assert plan.tickets.tolist() == [each.ticket for each in plan.sampled]
        assert plan.sampled_slots.tolist() == [each.slot for each in plan.sampled]
        if len(behind) > 1 or not plan:
            for each in behind.pop(0).sampled:
                if each.slot >= 0:
                    each.receive(1)
                    if len(each.tokens) >= each.limit:
                        made.remove(each)
    assert made.free_slots == 16
    assert made.pool.num_free == 64


def test_a_step_of_sequences_that_just_go_on_looks_at_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduler(sequence(0, 9, 30), sequence(1, 10, 30))  # blocks of 8: the next ones at 16 and 16 tokens
    step(made)
    monkeypatch.setattr(Scheduler, "_attend", None)
    for length in range(10, 16):
        assert step(made).lengths.tolist() == [length, length + 1]
    with pytest.raises(TypeError):
        step(made)


def test_a_new_block_comes_with_the_token_that_needs_it_and_the_full_one_can_be_found() -> None:
    made = scheduler(sequence(0, 7, 30))
    step(made)
    plan = step(made)  # token 8 of a block of 8
    assert (plan.grown, len(made.running[0].blocks)) == ([], 1)
    plan = step(made)
    assert (plan.grown, len(made.running[0].blocks)) == (made.running, 2)
    assert made.pool.match(made.running[0].block_hashes(BLOCK, 1)) == made.running[0].blocks[:1]


def test_what_a_finished_sequence_has_filled_can_be_found() -> None:
    first = sequence(0, 7, 2)
    made = scheduler(first)
    step(made)
    step(made)
    assert made.running == []
    made.add(Sequence(EngineRequest(uid=1, prompt_ids=[*first.tokens[:8], 5], max_new_tokens=1), 10))
    step(made)
    assert made.pool.hit_tokens == 8


@pytest.mark.parametrize("least", [0, 3])
def test_rows_that_may_not_end_are_marked_while_they_may_not(least: int) -> None:
    made = scheduler(sequence(0, 4, 8, least), sequence(1, 4, 8))
    step(made)
    marks = [plan.held.tolist() if plan.held is not None else None for plan in (step(made) for _ in range(4))]
    assert marks == ([[True, False]] * 2 + [[False, False]] * 2 if least else [None] * 4)


def test_a_slot_has_another_ticket_for_each_owner_and_none_while_it_is_free() -> None:
    slots = Slots(3)
    tickets = []
    for _ in range(4):
        slot, ticket = slots.take()
        assert slots.ticket[slot] == ticket > 0
        tickets.append(ticket)
        slots.give_back(slot)
        assert slots.ticket[slot] == 0
    assert all(before < after for before, after in itertools.pairwise(tickets))
    assert slots.num_free == 3
