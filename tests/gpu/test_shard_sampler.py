"""The stages of the CUDA library for ranks that have parts of the vocabulary: bit for bit what one GPU draws.

The ranks are threads that share a GPU; ranks with a GPU each are in tests/gpu/test_ranks.py.
"""

from __future__ import annotations

import pytest
import torch

from mii.batching.data_classes import SamplingParams
from mii.modeling.sharding import split
from mii.ops import native, shard_sampler
from mii.ops.sampler import SamplingTable
from mii.ops.shard_sampler import Draws, sample_shards
from tests.ops.test_shard_sampler import CHOICES, draw, peculiar_logits
from tests.parallel.threads import ThreadGroup, on_one_device


@pytest.fixture(autouse=True)
def by_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference would do is no proof of the kernels."""
    monkeypatch.setattr(shard_sampler, "_best", lambda *a: pytest.fail("the reference served"))


def agree(logits: torch.Tensor, choices: list[SamplingParams], size: int, **options: object) -> torch.Tensor:
    """The tokens of one rank, once those of `size` ranks are found to be the same."""
    alone, each = draw(logits.cuda(), choices, size, on_ranks=on_one_device, **options)  # type: ignore[arg-type]
    for tokens in each:
        assert torch.equal(tokens, alone)
    return alone


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1009, 32000, 128256])
def test_every_combination_of_filters_draws_what_one_rank_draws(vocab: int, dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(len(CHOICES), vocab, generator=generator) * 3).to(dtype)
    agree(logits, CHOICES, size)
    agree(logits[:5], CHOICES[-5:], size)  # few rows run in larger clusters


def test_more_rows_than_exchange_histograms_at_once() -> None:
    rows = 300
    logits = torch.randn(rows, 5000) * 3
    choices = [SamplingParams(temperature=row % 3 / 2, top_k=row % 2 * 50, top_p=0.9, seed=row) for row in range(rows)]
    agree(logits, choices, 2)
    agree(logits, [SamplingParams(temperature=0.0)] * rows, 2)


def test_flat_rows_keep_what_lies_at_the_border() -> None:
    """All tokens tie, and the kept ones are more than top_k."""
    choices = [SamplingParams(temperature=1.0, top_k=k, top_p=p, seed=9) for k in (0, 1, 100) for p in (1.0, 0.5)]
    agree(torch.zeros(6, 40000), choices, 4)


def test_ties_infinities_nan_and_empty_rows_are_as_on_one_rank() -> None:
    for temperature in (0.0, 1.0):
        choices = [SamplingParams(temperature=temperature, top_k=2, top_p=0.9, seed=row) for row in range(8)]
        agree(peculiar_logits(), choices, 3)


def test_suppressed_ids_are_left_out_on_whichever_rank_they_are() -> None:
    logits = torch.zeros(4, 256)
    logits[:, 200], logits[:, 3] = 10.0, 8.0
    logits[3] = float("-inf")
    suppress = torch.tensor([1, 0, 1, 1], dtype=torch.int32, device="cuda")
    suppress_ids = torch.tensor([200, 3, 900, 0], dtype=torch.int32, device="cuda")
    choices = [SamplingParams(temperature=t, seed=5) for t in (0.0, 0.0, 0.8, 0.0)]
    drawn = agree(logits, choices, 2, suppress=suppress, suppress_ids=suppress_ids)
    assert drawn[1] == 200 and drawn[0] not in (200, 3) and drawn[3] == 1


def test_rows_of_padding_stay_untouched() -> None:
    counts = torch.tensor([0, 0, 2, 0, 0, 0, 0, 0], dtype=torch.int32, device="cuda")
    choices = [SamplingParams(temperature=1.0, seed=row) for row in range(5)]
    assert agree(torch.randn(5, 128), choices, 2, counts=counts)[2:].tolist() == [-7, -7, -7]


@pytest.mark.parametrize("draws", [Draws(), Draws(random=True, top_p=True)])
def test_rows_that_are_all_padding_change_nothing(draws: Draws) -> None:
    def work(group: ThreadGroup) -> list[list[int]]:
        span, slots = split(300, group.rank, group.size), torch.full((3,), -1, dtype=torch.int32, device="cuda")
        tokens, last = torch.full_like(slots, -7), torch.arange(5, 9, dtype=torch.int32, device="cuda")
        sample_shards(
            tokens, torch.zeros(3, span.size, device="cuda"), SamplingTable.allocate(4, "cuda"), slots,
            torch.zeros_like(slots), span=span, group=group, draws=draws, last_token=last,  # type: ignore[arg-type]
        )  # fmt: skip
        return [tokens.tolist(), last.tolist()]

    assert on_one_device(2, work) == [[[-7, -7, -7], [5, 6, 7, 8]]] * 2


def test_the_library_has_the_stages() -> None:
    library = native.library(torch.device("cuda"))
    assert library is not None and library.has("mii_sample_shard")
