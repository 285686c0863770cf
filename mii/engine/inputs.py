"""From a plan to the numbers that a step's copy carries to the device.

It runs between two steps, so what hundreds of sequences have is written by columns, not one by one.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable

import numpy as np

from mii.batching.scheduler import Chunk, Plan
from mii.engine.sequence import Sequence
from mii.ops import abi
from mii.ops.staging import HostStep

TableUpdate = tuple[int, int, int]


def fill_step(host: HostStep, plan: Plan) -> int:
    """Writes a plan into the staging buffer: who takes part, with which tokens, how long each context then is.

    Returns:
        How many rows sample.
    """
    count = len(plan.decodes)
    if count:
        host.seq_slot[:count] = plan.slots
        host.kv_len[:count] = plan.lengths
        host.host_ids[:count] = -1  # what the device sampled last
        host.sample_seq[:count] = np.arange(count, dtype=np.int32)
    host.q_start[: count + 1] = np.arange(count + 1, dtype=np.int32)
    samples = _fill_prompts(host, plan.prompts, count) if plan.prompts else count
    host.counts[: abi.NUM_SAMPLES + 1] = (plan.num_sequences, plan.num_tokens, samples)
    return samples


def _fill_prompts(host: HostStep, prompts: list[Chunk], first: int) -> int:
    """The rows of chunks, from row `first` on; returns how many rows sample in all."""
    rows = slice(first, first + len(prompts))
    host.seq_slot[rows] = [chunk.sequence.slot for chunk in prompts]
    host.kv_len[rows] = [chunk.start + chunk.size for chunk in prompts]
    token = samples = first
    for row, chunk in enumerate(prompts, first):
        host.host_ids[token : token + chunk.size] = _ints(chunk.sequence.tokens[chunk.start : chunk.start + chunk.size])
        token += chunk.size
        host.q_start[row + 1] = token
        if chunk.samples:
            host.sample_seq[samples] = row
            samples += 1
    return samples


def digest(host: HostStep, plan: Plan) -> int:
    """A number that differs where two ranks would compute different steps: from other tokens, places or lengths."""
    sequences, tokens = int(host.counts[abi.NUM_SEQS]), int(host.counts[abi.NUM_TOKENS])
    known = array("i", (sequence.tokens[-1] for sequence in plan.decodes))
    value = zlib.crc32(known, zlib.crc32(host.counts.data))
    for used in (host.seq_slot[:sequences], host.kv_len[:sequences], host.host_ids[:tokens]):
        value = zlib.crc32(used.data, value)
    return zlib.crc32(host.table_updates[: host.counts[abi.NUM_UPDATES]].data, value)


def _ints(values: Iterable[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Several times faster than numpy's own way from a list."""
    return np.frombuffer(array("i", values), np.int32)


class SentBlocks:
    """Which blocks of which sequence the device's table of blocks has, by slot."""

    def __init__(self, slots: int) -> None:
        self._sent = [(0, 0)] * slots  # the ticket of its owner, and how many blocks

    def updates(self, plan: Plan) -> tuple[list[TableUpdate], list[Sequence]]:
        """(slot, index, block) of every block of a plan that the device does not know of yet, and the sequences that
        it does not know at all. Both count as sent from now on.
        """
        updates: list[TableUpdate] = []
        started: list[Sequence] = []
        for sequence in (*plan.grown, *(chunk.sequence for chunk in plan.prompts)):
            slot, blocks = sequence.slot, sequence.blocks
            ticket, known = self._sent[slot]
            if ticket != sequence.ticket:
                known = 0
                started.append(sequence)
            if known < len(blocks):
                updates += [(slot, index, blocks[index]) for index in range(known, len(blocks))]
                self._sent[slot] = (sequence.ticket, len(blocks))
        return updates, started
