"""Step preparation: the reference against a plain loop over sequences, the kernels against the same loop."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from mii.ops import abi
from mii.ops import prepare as prepare_module
from mii.ops.prepare import StepTensors, prepare, prepare_reference
from mii.ops.staging import HostStep
from tests.ops.kernel_checks import kernels_only

OUTPUTS = ("ids", "positions", "kv_slots", "rope_rows", "sample_rows", "sample_slots", "sample_positions")
UNTOUCHED = -12345


@dataclass(frozen=True)
class Case:
    """A step: bounds of the tensors, then how many query tokens each sequence feeds."""

    max_seqs: int
    max_tokens: int
    lengths: tuple[int, ...]
    block_size: int = 16
    updates: int = 5
    max_updates: int = 64
    shifted: bool = False

    @property
    def max_blocks(self) -> int:
        return (max(self.lengths, default=0) + 300) // self.block_size + 2


CASES = {
    "nothing": Case(4, 16, ()),
    "one_token": Case(1, 1, (1,), updates=0),
    "decode": Case(8, 8, (1,) * 8),
    "padded_decode": Case(64, 64, (1,) * 37, updates=64),
    "one_prompt": Case(4, 512, (500,)),
    "full_bucket": Case(3, 96, (32, 1, 63), block_size=32),
    "mixed": Case(40, 700, (1,) * 20 + (130, 16, 15, 17, 48) + (1,) * 6, block_size=64),
    "sequences_without_tokens": Case(9, 40, (0, 3, 0, 0, 5, 1, 0)),
    "shifted_rotations": Case(40, 700, (1,) * 20 + (130, 16, 0, 17, 48) + (1,) * 6, shifted=True),
    "blocks_of_one": Case(4, 32, (7, 9), block_size=1),
    "blocks_of_48": Case(4, 128, (100, 9), block_size=48),
    "whole_prompt_bucket": Case(
        512, 8192, (1,) * 480 + (7000, 32, 1, 600), block_size=64, max_updates=600, updates=500
    ),
    "more_sequences_than_shared_memory_holds": Case(5000, 6000, (1,) * 4999, updates=60),
}


@dataclass(frozen=True)
class Plan:
    """What a step's tensors have to come out as, worked out sequence by sequence."""

    outputs: dict[str, list[int]]
    block_table: list[list[int]]


def fill(case: Case, step: StepTensors, seed: int) -> Plan:
    """Fills the step with a random plan and returns what must come out."""
    draw = random.Random(seed)
    slots, max_blocks = step.block_table.shape
    blocks = iter(draw.sample(range(2 * slots * max_blocks), slots * max_blocks + case.updates))  # no block twice
    table = [[next(blocks) for _ in range(max_blocks)] for _ in range(slots)]
    last_token = [draw.randrange(50000) for _ in range(slots)]
    step.block_table.copy_(torch.tensor(table, dtype=torch.int32))
    step.last_token.copy_(torch.tensor(last_token, dtype=torch.int32))
    host = step.host()
    for name in HostStep.__dataclass_fields__:
        getattr(host, name)[...] = UNTOUCHED  # what a former step left must not matter

    entries = draw.sample([(slot, index) for slot in range(slots) for index in range(max_blocks)], case.updates)
    for u, (slot, index) in enumerate(entries):
        table[slot][index] = next(blocks)
        host.table_updates[u] = slot, index, table[slot][index]
    taken = draw.sample(range(slots), len(case.lengths))
    outputs: dict[str, list[int]] = {name: [] for name in OUTPUTS}
    samples = 0
    for s, (slot, length) in enumerate(zip(taken, case.lengths, strict=True)):
        start, before = len(outputs["ids"]), draw.randrange(300)
        host.seq_slot[s], host.q_start[s], host.kv_len[s] = slot, start, before + length
        shift = 0
        if case.shifted:
            host.rope_shift[s] = shift = draw.choice((0, 4096))
        for j in range(length):
            token = draw.choice((-1, draw.randrange(50000)))
            host.host_ids[start + j] = token
            position = before + j
            outputs["ids"].append(last_token[slot] if token < 0 else token)
            outputs["positions"].append(position)
            outputs["rope_rows"].append(position + shift)
            block = table[slot][position // case.block_size]
            outputs["kv_slots"].append(block * case.block_size + position % case.block_size)
        if length and draw.random() < 0.7:
            host.sample_seq[samples] = s
            samples += 1
            outputs["sample_rows"].append(start + length - 1)
            outputs["sample_slots"].append(slot)
            outputs["sample_positions"].append(before + length)
    tokens = len(outputs["ids"])
    host.q_start[len(case.lengths)] = tokens
    host.counts[:4] = len(case.lengths), tokens, samples, case.updates
    for name in OUTPUTS:
        size = case.max_seqs if name.startswith("sample") else case.max_tokens
        outputs[name] += [-1 if name in ("kv_slots", "sample_slots") else 0] * (size - len(outputs[name]))
    return Plan(outputs, table)


def allocate(case: Case, device: str) -> StepTensors:
    slots = case.max_seqs + 3
    return StepTensors.allocate(
        case.max_seqs, case.max_tokens, case.max_updates, case.max_blocks, slots, device, shifted=case.shifted
    )


def check_outputs(outputs: dict[str, torch.Tensor], plan: Plan) -> None:
    for name in OUTPUTS:
        assert outputs[name].tolist() == plan.outputs[name], name


def _check(step: StepTensors, plan: Plan) -> None:
    check_outputs({name: getattr(step, name) for name in OUTPUTS}, plan)
    assert step.block_table.tolist() == plan.block_table


def _poison(step: StepTensors) -> None:
    for name in OUTPUTS:
        getattr(step, name).fill_(UNTOUCHED)


def check_kernel(device: str, case: Case) -> None:
    """Two steps on the same tensors come out as the plain loop says."""
    step = allocate(case, device)
    for seed in range(2):
        plan = fill(case, step, seed)
        step.upload()
        _poison(step)
        with kernels_only(prepare_module):
            prepare(step, case.block_size)
        _check(step, plan)


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_a_plain_loop(name: str) -> None:
    case = CASES[name]
    step = allocate(case, "cpu")
    plan = fill(case, step, seed=0)
    _poison(step)
    prepare_reference(step, case.block_size)
    _check(step, plan)


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_a_plain_loop(native_device: str, name: str) -> None:
    check_kernel(native_device, CASES[name])


def test_a_bucket_is_the_same_memory_with_smaller_bounds() -> None:
    case = Case(8, 64, (1, 5))
    step = allocate(case, "cpu")
    plan = fill(case, step, seed=3)
    _poison(step)
    bucket = step.bucket(2, 10)
    prepare_reference(bucket, case.block_size)
    assert (bucket.max_seqs, bucket.max_tokens, len(bucket.q_start)) == (2, 10, 3)
    assert step.ids.tolist() == plan.outputs["ids"][:10] + [UNTOUCHED] * 54
    assert step.sample_slots.tolist() == plan.outputs["sample_slots"][:2] + [UNTOUCHED] * 6


@pytest.mark.parametrize(("seqs", "tokens"), [(9, 64), (8, 65), (0, 1), (1, 0)])
def test_a_bucket_beyond_the_bounds_is_refused(seqs: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="does not fit step tensors of 8 sequences and 64 tokens"):
        allocate(Case(8, 64, ()), "cpu").bucket(seqs, tokens)


def test_inputs_are_views_of_one_buffer_on_separate_cache_lines() -> None:
    step = StepTensors.allocate(5, 33, 7, 4, 6, "cpu")
    inputs = ("counts", "seq_slot", "q_start", "kv_len", "sample_seq", "table_updates", "host_ids")
    starts = [getattr(step, name).data_ptr() - step.packed.data_ptr() for name in inputs]
    assert starts == sorted(starts)
    assert all(start % 128 == 0 for start in starts)
    assert step.host_ids.data_ptr() + 4 * 33 <= step.packed.data_ptr() + 4 * step.packed.numel()
    step.host().counts[abi.NUM_TOKENS] = 9
    step.host().host_ids[32] = 77
    step.upload()
    assert (step.counts[abi.NUM_TOKENS], step.host_ids[32]) == (9, 77)
