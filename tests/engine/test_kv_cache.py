"""The block pool: no block leaks, none is freed twice, and a common beginning is held once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mii.engine.kv_cache import BlockPool, NoFreeBlocks, chain_hash

BLOCK = 4


def hashes_of(tokens: list[int]) -> list[bytes]:
    chain: list[bytes] = []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        chain.append(chain_hash(chain[-1] if chain else None, tokens[start : start + BLOCK]))
    return chain


class PoolMachine(RuleBasedStateMachine):
    """Random sequences come, share prefixes, grow and go; a plain model of who holds what is kept beside the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(24, BLOCK)
        self.held: dict[int, list[int]] = {}
        self.content: dict[int, bytes] = {}
        self.next_id = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24))
    def start(self, tokens: list[int]) -> None:
        chain = hashes_of(tokens)
        matched = self.pool.match(chain)
        for block, digest in zip(matched, chain, strict=False):
            assert self.content[block] == digest, "a cached block must hold the content that was asked for"
        fresh = self.pool.blocks_for(len(tokens)) - len(matched)
        if fresh > self.pool.num_free - self.pool.num_unused(matched):
            return
        self.pool.take(matched)
        blocks = matched + self.pool.allocate(fresh)
        for block in blocks[len(matched) :]:
            self.content.pop(block, None)
        for index in range(len(matched), len(chain)):
            self.pool.register(blocks[index], chain[index])
            self.content[blocks[index]] = chain[index]
        self.held[self.next_id] = blocks
        self.next_id += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.held)))
        if self.pool.num_free:
            (block,) = self.pool.allocate(1)
            self.content.pop(block, None)
            self.held[owner].append(block)
        else:
            with pytest.raises(NoFreeBlocks):
                self.pool.allocate(1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(self.held.pop(owner))

    @invariant()
    def references_are_counted(self) -> None:
        counts = [0] * self.pool.num_blocks
        for blocks in self.held.values():
            assert len(set(blocks)) == len(blocks), "a sequence holds each block once"
            for block in blocks:
                counts[block] += 1
        assert [self.pool.references(block) for block in range(self.pool.num_blocks)] == counts
        assert self.pool.num_free == counts.count(0), "every block nobody refers to is free, and no other"


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40)


def test_freeing_twice_is_an_error() -> None:
    pool = BlockPool(2, BLOCK)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(blocks)


def test_asking_for_too_much_takes_nothing() -> None:
    pool = BlockPool(3, BLOCK)
    with pytest.raises(NoFreeBlocks, match="4 KV blocks were asked for and 3 are free"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_the_beginning_of_a_released_prompt_outlives_its_end() -> None:
    pool = BlockPool(4, BLOCK)
    chain = hashes_of(list(range(16)))
    blocks = pool.allocate(4)
    for block, digest in zip(blocks, chain, strict=True):
        pool.register(block, digest)
    pool.release(blocks)
    pool.allocate(2)
    assert pool.match(chain) == blocks[:2]


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(4, BLOCK, prefix_caching=False)
    blocks = pool.allocate(1)
    chain = hashes_of([1, 2, 3, 4])
    pool.register(blocks[0], chain[0])
    assert pool.match(chain) == []


@given(st.lists(st.integers(0, 2**31), min_size=8, max_size=8), st.integers(0, 7))
def test_a_hash_depends_on_every_token_before_it(tokens: list[int], changed: int) -> None:
    other = list(tokens)
    other[changed] += 1
    assert hashes_of(tokens)[1] != hashes_of(other)[1]
    assert (hashes_of(tokens)[0] == hashes_of(other)[0]) == (changed >= 4)
