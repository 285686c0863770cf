"""When a step needs each of its buffers, and where they lie in one piece of memory: those that are never needed at the
same time share a place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Of a layer, in order, and then of the end of the step; after a layer's last stage comes "norm" of the next layer.
STAGES = (
    *("norm", "qkv", "attend", "output", "mlp_norm"),
    *("up", "activate", "down", "experts_up", "experts_down", "combine"),
    "end",
)

Life = frozenset[str]
ALWAYS: Life = frozenset(STAGES)


def life(*spans: tuple[str, str]) -> Life:
    """The stages of a buffer that is needed from the first to the last stage of each span."""
    return frozenset(stage for first, last in spans for stage in STAGES[STAGES.index(first) : STAGES.index(last) + 1])


@dataclass(frozen=True, slots=True)
class Claim:
    """What a buffer needs: so much memory, in any unit, in these stages."""

    size: int
    life: Life


def lay_out(claims: Mapping[str, Claim]) -> dict[str, int]:
    """Where each buffer begins, so that buffers with a stage in common have no memory in common.

    The largest come first, each at the lowest place that is free: first fit for offline memory planning (Pisarchyk and
    Lee, arXiv 2001.03288).
    """
    places: dict[str, int] = {}
    for name, claim in sorted(claims.items(), key=lambda item: -item[1].size):
        place = 0
        for other in sorted(places, key=places.__getitem__):
            if not claims[other].life & claim.life:
                continue
            if place + claim.size <= places[other]:
                break
            place = max(place, places[other] + claims[other].size)
        places[name] = place
    return places
