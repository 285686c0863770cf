"""What is asked of a server: how long prompts and answers are, and the prompts.

Prompts are token ids at random, or windows over a text that move on by one token with each request, as those of
DeepSpeed-FastGen's benchmark do: no two begin alike, so a prefix cache neither helps nor has to be turned off.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mii.benchmark.shapes import MIXES

__all__ = ["Ask", "Lengths", "RandomIds", "TextWindows", "Work", "mix_lengths", "normal_lengths"]

Lengths = Callable[[random.Random], tuple[int, int]]
"""Draws the tokens of a prompt and of its answer."""

_IDS_LEFT_OUT = 10  # at both ends of a vocabulary lie special tokens


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Args:
        prompt: text, or token ids.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens of the answer.
    """

    prompt: str | list[int]
    prompt_tokens: int
    new_tokens: int


def mix_lengths(name: str) -> Lengths:
    """The lengths of a mix of `mii.benchmark.shapes`.

    Raises:
        KeyError: there is none of this name.
    """
    return MIXES[name].lengths


def normal_lengths(
    prompt: float, prompt_spread: float, longest_prompt: int, answer: float, answer_spread: float
) -> Lengths:
    """Normally distributed lengths, as in DeepSpeed-FastGen's benchmark.

    Args:
        prompt: mean tokens of a prompt.
        prompt_spread: standard deviation of it, as a share of the mean.
        longest_prompt: tokens that a prompt is cut to.
        answer: mean tokens of an answer.
        answer_spread: standard deviation of it, as a share of the mean.
    """

    def draw(rng: random.Random) -> tuple[int, int]:
        prompt_tokens = min(longest_prompt, max(1, round(rng.gauss(prompt, prompt_spread * prompt))))
        return prompt_tokens, max(1, round(rng.gauss(answer, answer_spread * answer)))

    return draw


@dataclass(frozen=True, slots=True)
class RandomIds:
    """Prompts of token ids at random.

    Args:
        vocab: token ids are below this.
        seed: the same prompts come again for the same seed.
    """

    vocab: int
    seed: int

    def __call__(self, index: int, tokens: int) -> list[int]:
        """The prompt of a request."""
        rng = np.random.default_rng([self.seed, index])
        ids: list[int] = rng.integers(_IDS_LEFT_OUT, self.vocab - _IDS_LEFT_OUT, tokens).tolist()
        return ids


class TextWindows:
    """Prompts that are windows over a text, which begins again at its end.

    Args:
        ids: the text's tokens.
        decode: turns tokens into text.

    Raises:
        ValueError: the text has no tokens.
    """

    def __init__(self, ids: list[int], decode: Callable[[list[int]], str]) -> None:
        if not ids:
            raise ValueError("the text for the prompts is empty; give a file with some pages of text")
        self._ids, self._decode = ids, decode

    def __call__(self, index: int, tokens: int) -> str:
        """The prompt of a request."""
        begin, ids = index % len(self._ids), self._ids
        while len(ids) < begin + tokens:
            ids = ids + self._ids
        return self._decode(ids[begin : begin + tokens])


class Work:
    """Requests one after the other, without end, the same for the same seed.

    Args:
        lengths: how long they are.
        prompt: makes the prompt of the request of a number, of so many tokens.
        seed: of the lengths.
        limit: tokens that prompt and answer may have together; None: any.
    """

    def __init__(
        self, lengths: Lengths, prompt: Callable[[int, int], str | list[int]], seed: int, limit: int | None = None
    ) -> None:
        self._lengths, self._prompt, self._limit = lengths, prompt, limit
        self._rng = random.Random(seed)
        self._index = 0

    def take(self, count: int) -> list[Ask]:
        """The next requests.

        Raises:
            ValueError: one is longer than what the server takes.
        """
        return [self._next() for _ in range(count)]

    def _next(self) -> Ask:
        prompt_tokens, new_tokens = self._lengths(self._rng)
        if self._limit is not None and prompt_tokens + new_tokens > self._limit:
            raise ValueError(
                f"a request has {prompt_tokens} tokens of prompt and {new_tokens} of answer, and the server takes "
                f"{self._limit} in all; give smaller lengths, or start it with a larger max_length"
            )
        self._index += 1
        return Ask(self._prompt(self._index, prompt_tokens), prompt_tokens, new_tokens)
