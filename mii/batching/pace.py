"""How long a step takes, and how much of a prompt it may take so that running answers get their tokens in time.

A step's time is that of its products, which no step can do in less time than reading all weights takes, plus that of
attention: reading the context of every sequence that decodes, and multiplying each token of a prompt with all before
it (the roofline model, Williams, Waterman and Patterson, 2009). Pure arithmetic, so every rank comes to the same plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of what steps consist of.

    Args:
        step: A step with hardly any tokens: reading the weights.
        token: The products of one token in a step of many.
        context: Reading one cached token of a sequence that decodes.
        pair: Multiplying a token of a prompt with one before it.
    """

    step: float
    token: float
    context: float = 0.0
    pair: float = 0.0

    def decode(self, sequences: int, context: int) -> float:
        """Seconds of a step in which so many sequences, of so many tokens in all, decode."""
        return max(self.step, sequences * self.token) + context * self.context

    def chunk(self, tokens: int, start: int) -> float:
        """Seconds that so many tokens of a prompt add, from its token `start` on."""
        return tokens * (self.token + self.pair * (start + tokens / 2))

    def fitting(self, seconds: float, start: int) -> int:
        """How many tokens of a prompt, from its token `start` on, take no longer than this.

        >>> costs = StepCosts(step=5e-3, token=25e-6, pair=1e-9)
        >>> costs.fitting(10e-3, start=0), costs.chunk(costs.fitting(10e-3, start=0), 0) <= 10e-3
        (396, True)
        """
        if seconds <= 0:
            return 0
        each = self.token + self.pair * start  # solves chunk(tokens, start) = seconds
        return int(2 * seconds / (each + math.sqrt(each * each + 2 * self.pair * seconds)))


@dataclass(frozen=True, slots=True)
class Pace:
    """A time for each token that the scheduler keeps, as far as `costs` are right.

    Args:
        costs: Of the model on this device.
        seconds: A step in which sequences decode shall take no longer.
        least: Tokens of a prompt that such a step takes even so, since prompts would never end otherwise.
    """

    costs: StepCosts
    seconds: float
    least: int = 16

    def left(self, decodes: int, context: int) -> float:
        """Seconds that a step with these decoding sequences has for prompts."""
        # Weights are read once for both, so what the products of decoding leave of that time is not lost.
        return self.seconds - context * self.costs.context - decodes * self.costs.token

    def admits(self, running: int, context: int) -> bool:
        """Whether so many sequences, of so many tokens in all, decode in time. One always may."""
        return running <= 1 or self.costs.decode(running, context) <= self.seconds


def make_pace(costs: StepCosts, target: float | None, least: int) -> Pace:
    """The pace of a target in seconds; without one, four times what a step takes at least.

    A target that no step can meet becomes one and a half times that least.
    """
    wanted = 4 * costs.step if target is None else target
    return Pace(costs, max(wanted, 1.5 * costs.step), least)
