"""Sampling where each rank has the logits of a part of the vocabulary: no rank ever sees them all.

The CUDA library has a kernel for each step (`mii.ops.shard_stages`); what is here is the reference, and serves on CPUs.

The method is `mii.ops.sampler`'s, step by step, and since that works in integers, whose sums are exact in any order,
every rank draws bit for bit the token that one rank with all the logits would draw. What the ranks exchange for each
row:

1. best       the largest logit and the lowest id that has it, two numbers; with that a greedy row is done.
2. top-k      the k-th smallest distance: three histograms of distances, one for each digit (radix selection).
3. top-p      the same with weights in place of counts; the first histogram also gives the total.
4. draw       each rank's weight of kept tokens. The ranks hold the vocabulary in the order of ids, so the point that
              the random number names lies within one rank's weights; that rank looks the token up and tells the others.

Nothing here looks at a value, so a graph can hold it; what a step needs of this is decided before, from its requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mii.modeling.sharding import Span
from mii.ops import abi
from mii.ops.all_reduce import Group
from mii.ops.philox import random62
from mii.ops.sampler import (
    LIMIT,
    SamplingChoice,
    SamplingTable,
    distances,
    min_p_distance,
    sample_arguments,
    scaled,
    weights,
)
from mii.ops.shard_stages import sample_by_stages

_DIGIT, _SHIFTS = 10, (20, 10, 0)  # a distance is looked at in three digits
_BLOCK = 1 << 22  # logits of all ranks that are handled at once: bounds the memory


class Draws(NamedTuple):
    """What the rows of a step ask for. Ranks must agree on it, so it comes from the step's requests."""

    random: bool = False
    top_k: bool = False
    top_p: bool = False

    @classmethod
    def of(cls, choices: Iterable[SamplingChoice]) -> Draws:
        """What these requests need.

        >>> from mii.batching.data_classes import SamplingParams
        >>> Draws.of([SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)])
        Draws(random=True, top_k=False, top_p=True)
        """
        drawn = [choice for choice in choices if choice.temperature > 0]
        return cls(bool(drawn), any(c.top_k > 0 for c in drawn), any(c.top_p < 1 for c in drawn))


@dataclass(frozen=True, slots=True)
class _Rows:
    """The parameters of some rows, each [rows]."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    random: torch.Tensor  # 62 bits


def sample_shards(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    params: SamplingTable,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    span: Span,
    group: Group,
    draws: Draws,
    counts: torch.Tensor | None = None,
    last_token: torch.Tensor | None = None,
    suppress: torch.Tensor | None = None,
    suppress_ids: torch.Tensor | None = None,
) -> None:
    """`mii.ops.sampler.sample` on parts of the vocabulary; every rank gets the same tokens.

    Args:
        tokens, params, slots, positions, counts, last_token, suppress, suppress_ids: as there, the same on every
            rank; at least one row, and the first one is no padding, unless all are.
        logits: [rows, span.size], this rank's.
        span: the ids whose logits they are.
        group: the ranks, which hold the vocabulary in order.
        draws: what the rows ask for.
    """
    if logits.is_cuda:
        args = sample_arguments(
            tokens, logits, params, slots, positions, counts=counts, last_token=last_token, suppress=suppress,
            suppress_ids=suppress_ids,
        )  # fmt: skip
        if sample_by_stages(args, logits.device, span=span, group=group, draws=draws):
            return
    active = slots >= 0
    if counts is not None:
        active = active & (torch.arange(len(slots), device=slots.device) < counts[abi.NUM_SAMPLES])
    slot = torch.where(active, slots, slots[0].clamp(min=0)).long()  # rows of padding draw what the first row draws
    step = max(1, _BLOCK // span.whole)
    for start in range(0, len(slots), step):
        rows = slice(start, start + step)
        values, lowest = _visible(logits[rows], span, None if suppress is None else suppress[rows], suppress_ids)
        best, drawn = _best(values, lowest, span, group)
        if draws.random:
            drawn = _draw(values, best, drawn, _chosen(params, slot[rows], positions[rows]), span, group, draws)
        drawn = drawn.int()
        tokens[rows] = torch.where(active[rows], drawn, tokens[rows])
    if last_token is not None:
        # a tensor of one number as the index would be read by the host, which a graph forbids
        first = torch.where(active[:1], tokens[:1], last_token[slot[:1]])
        last_token.scatter_(0, slot, torch.where(active, tokens, first))


def _chosen(params: SamplingTable, slot: torch.Tensor, positions: torch.Tensor) -> _Rows:
    return _Rows(
        params.temperature[slot],
        params.top_p[slot],
        params.min_p[slot],
        params.top_k[slot].long(),
        random62(params.seed[slot], positions.long()),
    )


def _visible(
    logits: torch.Tensor, span: Span, suppress: torch.Tensor | None, suppress_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float logits with suppressed ones and NaN at -inf, and the lowest id of each row that is not suppressed."""
    values = logits.float()
    hidden = values.isnan()
    ids = torch.arange(span.start, span.stop, device=logits.device)
    lowest = ids[:1].expand(len(values))
    if suppress is not None and suppress_ids is not None:
        barred = (suppress != 0).unsqueeze(1) & torch.isin(ids, suppress_ids).unsqueeze(0)
        hidden = hidden | barred
        lowest = torch.where(barred, span.whole, ids).amin(1)
    return values.masked_fill(hidden, float("-inf")), lowest


def _draw(
    values: torch.Tensor, best: torch.Tensor, greedy: torch.Tensor, rows: _Rows, span: Span, group: Group, draws: Draws
) -> torch.Tensor:
    """Token ids, int64 [rows]: the greedy ones where nothing else is asked for."""
    heat = torch.where(rows.temperature > 0, rows.temperature, 1.0).unsqueeze(1)
    distance = distances(best.unsqueeze(1), values, heat)
    weight = weights(distance)
    threshold = min_p_distance(rows.min_p)
    if draws.top_k:
        threshold = torch.minimum(threshold, _top_k(distance, rows.top_k, span.whole, group))
    if draws.top_p:
        threshold = torch.minimum(threshold, _top_p(distance, weight, threshold, rows.top_p, group))
    running = weight.masked_fill(distance > threshold.unsqueeze(1), 0).cumsum(1)
    totals = group.all_gather(running[:, -1])
    total, before = totals.sum(0), totals[: group.rank].sum(0)
    point = scaled(total, rows.random, 62) - before
    here = (point >= 0) & (point < running[:, -1])
    drawn = (running <= point.unsqueeze(1)).sum(1) + span.start
    drawn = group.all_gather(torch.where(here, drawn, -1)).amax(0)
    return torch.where((rows.temperature > 0) & (total > 0), drawn, greedy)


def _best(values: torch.Tensor, lowest: torch.Tensor, span: Span, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """The best logit of each row on all ranks, and the lowest id that has it."""
    mine = values.amax(1)
    ids = torch.arange(span.start, span.stop, device=values.device)
    where = torch.where(values == mine.unsqueeze(1), ids, span.whole).amin(1)
    gathered = group.all_gather(torch.stack([mine.view(torch.int32), where.int(), lowest.int()]))
    everyone = gathered[:, 0].contiguous().view(torch.float32)
    best = everyone.amax(0)
    first = torch.where(everyone == best, gathered[:, 1], span.whole).amin(0)
    return best, torch.where(best == float("-inf"), gathered[:, 2].amin(0) % span.whole, first).long()


def _top_k(distance: torch.Tensor, top_k: torch.Tensor, whole: int, group: Group) -> torch.Tensor:
    """The distance of the k-th best token of each row."""
    on = (top_k > 0) & (top_k < whole)
    first = _histogram(distance, torch.ones_like(distance), torch.zeros_like(top_k), _SHIFTS[0], group)
    found = _select(distance, torch.ones_like(distance), first, torch.where(on, top_k, 1), group)
    return torch.where(on, found, LIMIT - 1).clamp(max=LIMIT - 1)


def _top_p(
    distance: torch.Tensor, weight: torch.Tensor, threshold: torch.Tensor, top_p: torch.Tensor, group: Group
) -> torch.Tensor:
    """The distance up to which the kept tokens of each row reach top_p of their weight."""
    kept = weight.masked_fill(distance > threshold.unsqueeze(1), 0)
    first = _histogram(distance, kept, torch.zeros_like(threshold), _SHIFTS[0], group)
    share = (top_p.clamp(0, 1) * 2.0**31).long()
    found = _select(distance, kept, first, scaled(first[:, -1], share, 31).clamp(min=1), group)
    return torch.where(top_p < 1, found, LIMIT - 1)


def _select(
    distance: torch.Tensor, amount: torch.Tensor, running: torch.Tensor, target: torch.Tensor, group: Group
) -> torch.Tensor:
    """The smallest distance of each row up to which the amounts of all ranks reach the target, digit by digit.

    Args:
        distance, amount: int64 [rows, span.size].
        running: of the first digit, from `_histogram`.
        target: int64 [rows], at least 1.
    """
    prefix = torch.zeros_like(target)
    for shift in _SHIFTS:
        if shift != _SHIFTS[0]:
            running = _histogram(distance, amount, prefix, shift, group)
        chosen = (running < target.unsqueeze(1)).sum(1).clamp(max=running.shape[1] - 1)
        below = running.gather(1, (chosen - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        target = target - torch.where(chosen > 0, below, 0)
        prefix = (prefix << _DIGIT) + chosen
    return prefix


def _histogram(
    distance: torch.Tensor, amount: torch.Tensor, prefix: torch.Tensor, shift: int, group: Group
) -> torch.Tensor:
    """Running sums over the next digit's values of the amounts whose distance begins with `prefix`, of all ranks."""
    values = (LIMIT >> shift) + 1 if shift == _SHIFTS[0] else 1 << _DIGIT
    digit = (distance >> shift) - (prefix << _DIGIT).unsqueeze(1)
    inside = (digit >= 0) & (digit < values)
    sums = distance.new_zeros(len(distance), values)
    sums.scatter_add_(1, digit.clamp(0, values - 1), torch.where(inside, amount, 0))
    return group.all_gather(sums).sum(0).cumsum(1)
