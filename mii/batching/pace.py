"""How long a step takes, and how much of a prompt it may take so that running answers get their tokens in time.

A step's time is that of its products, which no step can do in less time than reading all weights takes, plus that of
attention: reading the context of every sequence that decodes, and multiplying each token of a prompt with all before
it (the roofline model, Williams, Waterman and Patterson, 2009). Pure arithmetic, so ranks with the same costs come to
the same plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_ANY = 1 << 30  # tokens: as many as there are


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
        return _most(seconds, self.token + self.pair * start, self.pair)

    def attending(self, seconds: float, start: int) -> int:
        """The same for their attention alone."""
        return _most(seconds, self.pair * start, self.pair)


def _most(seconds: float, each: float, pair: float) -> int:
    """The largest whole n for which n * each + pair * n * n / 2 is no more than `seconds`."""
    if seconds <= 0:
        return 0
    divisor = each + math.sqrt(each * each + 2 * pair * seconds)
    return int(min(2 * seconds / divisor, _ANY)) if divisor else _ANY


@dataclass(slots=True)
class TimeLeft:
    """What a step has left for prompts.

    Args:
        costs: Of the model on this device.
        products: Seconds for what they add to products and attention together.
        attention: Seconds for their attention alone: it comes on top of reading the weights, which no step is spared,
            and under which the products of a few tokens hide.
    """

    costs: StepCosts
    products: float
    attention: float

    def fitting(self, start: int) -> int:
        """How many tokens of a prompt, from its token `start` on, fit in."""
        return min(self.costs.fitting(self.products, start), self.costs.attending(self.attention, start))

    def take(self, tokens: int, start: int) -> None:
        """Takes off what so many tokens of a prompt need."""
        seconds = self.costs.chunk(tokens, start)
        self.products -= seconds
        self.attention -= seconds - tokens * self.costs.token


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

    def left(self, decodes: int, context: int) -> TimeLeft:
        """What a step with these decoding sequences has for prompts."""
        seconds, products = self.seconds - context * self.costs.context, decodes * self.costs.token
        # Weights are read once for both, so what the products of decoding leave of that time is not lost.
        return TimeLeft(self.costs, seconds - products, seconds - max(self.costs.step, products))

    def admits(self, running: int, context: int) -> bool:
        """Whether so many sequences, of so many tokens in all, decode in time. One always may."""
        return running <= 1 or self.costs.decode(running, context) <= self.seconds


def make_pace(costs: StepCosts, target: float | None, least: int) -> Pace:
    """The pace of a target in seconds; without one, four times what a step takes at least.

    A target that no step can meet becomes one and a half times that least.
    """
    wanted = 4 * costs.step if target is None else target
    return Pace(costs, max(wanted, 1.5 * costs.step), least)
