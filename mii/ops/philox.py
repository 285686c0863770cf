"""Philox4x32-10, the counter-based random numbers of the sampler, in integers of numpy arrays or torch tensors.

The same numbers come from `csrc/include/mii/philox.h` in C++ and CUDA. Source: Salmon, Moraes, Dror, Shaw, "Parallel
Random Numbers: As Easy as 1, 2, 3", SC 2011; the known answers of that paper's Random123 library are in the tests.

    >>> import numpy as np
    >>> [hex(int(word)) for word in philox4x32((np.int64(0),) * 4, (np.int64(0),) * 2)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Words = TypeVar("Words", np.ndarray, np.int64, torch.Tensor)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
ROUNDS = 10


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words], rounds: int = ROUNDS
) -> tuple[Words, Words, Words, Words]:
    """Four random 32-bit words for each counter and key.

    Args:
        counter: four int64 arrays (or tensors) of one shape, each holding unsigned 32-bit words.
        key: two of the same kind.
        rounds: 10 is the published generator; fewer are for tests.

    Returns:
        Four int64 arrays of values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    with np.errstate(over="ignore"):  # products wrap modulo 2^64 on purpose; both halves stay right
        for _ in range(rounds):
            high0, low0 = _multiply(c0, _MULTIPLIERS[0])
            high1, low1 = _multiply(c2, _MULTIPLIERS[1])
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Words, factor: int) -> tuple[Words, Words]:
    product = word * factor
    return (product >> 32) & _MASK, product & _MASK


def random62(seed: Words, position: Words) -> Words:
    """The 62 random bits that decide the token at `position` of a request with `seed` (both int64, any value)."""
    zero = position & 0
    words = philox4x32((position & _MASK, zero, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))
    return ((words[0] >> 1) << 31) | (words[1] >> 1)
