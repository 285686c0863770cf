"""Tokens drawn on parts of the vocabulary are, bit for bit, those that one rank with all the logits draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from mii.batching.data_classes import SamplingParams
from mii.modeling.sharding import split
from mii.ops.sampler import SamplingTable, sample
from mii.ops.shard_sampler import Draws, sample_shards
from mii.parallel.group import Group
from tests.parallel.threads import on_ranks

CHOICES = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=1000 + index)
    for index, (temperature, top_k, top_p, min_p) in enumerate(
        itertools.product((0.0, 0.7, 1.5, 30.0), (0, 1, 7, 400, 5000), (1.0, 0.9, 0.3), (0.0, 0.02))
    )
]


OnRanks = Callable[[int, Callable[[Group], torch.Tensor]], list[torch.Tensor]]


def draw(
    logits: torch.Tensor,
    choices: list[SamplingParams],
    size: int,
    positions: range | None = None,
    on_ranks: OnRanks = on_ranks,
    **options: object,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What one rank draws, and what each of `size` ranks draws."""
    rows, vocab = logits.shape
    place = {"dtype": torch.int32, "device": logits.device}
    table = SamplingTable.allocate(rows, logits.device)
    table.assign(list(range(rows)), choices)
    slots = torch.arange(rows, **place)  # type: ignore[arg-type]
    places = torch.tensor(positions or range(rows), **place)  # type: ignore[arg-type]
    alone = torch.full_like(slots, -7)
    sample(alone, logits, table, slots, places, **options)  # type: ignore[arg-type]

    def work(group: Group) -> torch.Tensor:
        span = split(vocab, group.rank, group.size)
        tokens, last = torch.full_like(slots, -7), torch.zeros_like(slots)
        sample_shards(
            tokens, logits[:, span.slice], table, slots, places, span=span, group=group, draws=Draws.of(choices),
            last_token=last, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        drawn = tokens != -7
        assert torch.equal(last[drawn], tokens[drawn])
        return tokens

    return alone, on_ranks(size, work)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_combination_of_filters_draws_what_one_rank_draws(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(len(CHOICES), 1009, generator=generator) * 3).to(dtype)
    alone, each = draw(logits, CHOICES, size)
    for tokens in each:
        assert torch.equal(tokens, alone)


def peculiar_logits() -> torch.Tensor:
    inf, nan = float("inf"), float("nan")
    logits = torch.zeros(8, 300)
    logits[1] = -inf
    logits[2, 250], logits[2, 7] = inf, inf
    logits[3] = nan
    logits[4, :200], logits[4, 210] = nan, 5.0
    logits[5, 100], logits[5, 299] = 9.0, 9.0
    logits[6] = -inf
    logits[6, 299] = -3.0
    return logits


def test_ties_infinities_nan_and_empty_rows_are_as_on_one_rank() -> None:
    for temperature in (0.0, 1.0):
        choices = [SamplingParams(temperature=temperature, top_k=2, top_p=0.9, seed=row) for row in range(8)]
        alone, each = draw(peculiar_logits(), choices, 3)
        assert all(torch.equal(tokens, alone) for tokens in each)


def test_suppressed_ids_are_left_out_on_whichever_rank_they_are() -> None:
    logits = torch.zeros(4, 256)
    logits[:, 200], logits[:, 3] = 10.0, 8.0
    suppress = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
    suppress_ids = torch.tensor([200, 3, 900], dtype=torch.int32)
    logits[3] = float("-inf")
    choices = [SamplingParams(temperature=t, seed=5) for t in (0.0, 0.0, 0.8, 0.0)]
    alone, each = draw(logits, choices, 2, suppress=suppress, suppress_ids=suppress_ids)
    assert alone[1] == 200 and alone[0] not in (200, 3)
    assert all(torch.equal(tokens, alone) for tokens in each)


def test_rows_of_padding_stay_untouched() -> None:
    counts = torch.tensor([0, 0, 2, 0, 0, 0, 0, 0], dtype=torch.int32)
    logits = torch.randn(5, 128)
    choices = [SamplingParams(temperature=1.0, seed=row) for row in range(5)]
    alone, each = draw(logits, choices, 2, counts=counts)
    assert alone[2:].tolist() == [-7, -7, -7]
    assert all(torch.equal(tokens, alone) for tokens in each)


def test_what_is_exchanged_follows_from_the_requests() -> None:
    greedy, plain = SamplingParams(top_k=5, top_p=0.5), SamplingParams(temperature=1.0)
    assert Draws.of([greedy]) == Draws()
    assert Draws.of([greedy, plain]) == Draws(random=True)
    assert Draws.of([plain, SamplingParams(temperature=2.0, top_k=3)]) == Draws(random=True, top_k=True)


@pytest.mark.parametrize("draws", [Draws(), Draws(random=True, top_p=True)])
def test_rows_that_are_all_padding_change_nothing(draws: Draws) -> None:
    """As in steps that run when an engine starts."""

    def work(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        span, slots = split(300, group.rank, group.size), torch.full((3,), -1, dtype=torch.int32)
        tokens, last = torch.full((3,), -7, dtype=torch.int32), torch.arange(5, 9, dtype=torch.int32)
        sample_shards(
            tokens, torch.zeros(3, span.size), SamplingTable.allocate(4), slots, torch.zeros_like(slots), span=span,
            group=group, draws=draws, last_token=last,
        )  # fmt: skip
        return tokens, last

    for tokens, last in on_ranks(2, work):
        assert tokens.tolist() == [-7, -7, -7]
        assert last.tolist() == [5, 6, 7, 8]
