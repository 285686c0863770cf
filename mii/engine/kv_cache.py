"""KV blocks: counted references, content-addressed reuse, and no tensor.

A block holds the keys and values of `block_size` consecutive tokens of one sequence. Once full it gets a hash chained
over all tokens before it, so a later sequence with the same beginning takes the same block and adds a reference. A
block nobody refers to keeps its content and its hash and waits in the free list, oldest first: free blocks are the
cache.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from hashlib import blake2b

_ROOT = b"mii"


def chain_hash(parent: bytes | None, tokens: SequenceOf[int]) -> bytes:
    """The hash of a full block: 128 bits of BLAKE2b over the parent block's hash and this block's token ids."""
    return blake2b((parent or _ROOT) + array("q", tokens).tobytes(), digest_size=16).digest()


class NoFreeBlocks(RuntimeError):
    """More blocks were asked for than are free; nothing was taken."""


class BlockPool:
    """Owns `num_blocks` block numbers: which are free, how often each is referred to, and what each one holds."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"A KV cache needs at least one block of one token, not {num_blocks} blocks of {block_size}."
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.hit_tokens = 0
        self.queried_tokens = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, the longest unused first, and forgets what they held."""
        if count > len(self._free):
            raise NoFreeBlocks(f"{count} KV blocks were asked for and {len(self._free)} are free.")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._references[block] = 1
        return blocks

    def match(self, hashes: SequenceOf[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of a chain of hashes; nothing is taken yet."""
        matched: list[int] = []
        for digest in hashes if self.prefix_caching else ():
            block = self._block_of.get(digest)
            if block is None:
                break
            matched.append(block)
        return matched

    def num_unused(self, blocks: SequenceOf[int]) -> int:
        """How many of these blocks nobody refers to: taking them makes the free list that much shorter."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def take(self, blocks: SequenceOf[int]) -> None:
        """Adds a reference to each matched block."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def register(self, block: int, digest: bytes) -> None:
        """Makes a full block findable by its chained hash; the first block with a content stays the one found."""
        if not self.prefix_caching or digest in self._block_of:
            return
        self._forget(block)
        self._hash_of[block] = digest
        self._block_of[digest] = block

    def release(self, blocks: SequenceOf[int]) -> None:
        """Gives a sequence's blocks back, its last first, so that the beginning of a prompt outlives its end in the
        cache.
        """
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise AssertionError(f"KV block {block} was freed twice.")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def references(self, block: int) -> int:
        return self._references[block]

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None
