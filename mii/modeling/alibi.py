"""Attention with linear biases: the slope of each head (Press, Smith and Lewis, arXiv 2108.12409)."""

from __future__ import annotations


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slopes of the heads, steepest first.

    For 2^n heads they are the powers 1, 2, 3, ... of 2^(-8 / 2^n). Other counts take those of the next smaller power of
    two, and for the remaining heads the odd powers of the next larger one's.
    """
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return tuple(slopes)
