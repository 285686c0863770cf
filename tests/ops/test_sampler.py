"""The sampler: its reference against an oracle in float64 that sorts, the CPU library against the reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

from mii.ops import abi, native, sampler
from mii.ops.philox import random62
from mii.ops.sampler import SamplingTable, sample
from tests.ops.cpu_library import ISAS, using

VOCABULARIES = (1, 7, 65, 1000, 49152, 128256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Choice:
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int = 0


FILTERS = [
    Choice(),
    Choice(temperature=0.7),
    Choice(top_p=0.9),
    Choice(top_p=0.3, temperature=1.5),
    Choice(top_k=5),
    Choice(min_p=0.05),
    Choice(top_k=40, top_p=0.8, min_p=0.01, temperature=0.8),
]


@dataclass
class Batch:
    """Arguments of one call of `sample`, with everything that it writes."""

    logits: torch.Tensor
    choices: list[Choice]
    options: dict[str, Any] = field(default_factory=dict)
    slots: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """tokens, logprobs, last_token; -9 where nothing was written."""
        rows, device = self.logits.shape[0], self.logits.device
        table = SamplingTable.allocate(len(self.choices), device)
        table.assign(range(len(self.choices)), self.choices)
        slots = torch.arange(rows) if self.slots is None else self.slots
        positions = torch.zeros(rows) if self.positions is None else self.positions
        tokens, last_token = (torch.full((n,), -9, dtype=torch.int32, device=device) for n in (rows, table.slots))
        logprobs = torch.full((rows,), -9.0, device=device)
        sample(
            tokens, self.logits, table, slots.int().to(device), positions.int().to(device),
            last_token=last_token, logprobs=logprobs, **self.options,
        )  # fmt: skip
        return tokens, logprobs, last_token


def draws(logits: torch.Tensor, choice: Choice, count: int) -> torch.Tensor:
    """The tokens of one row of logits at positions 0 .. count-1."""
    slots = torch.zeros(count, dtype=torch.int32)
    with native.reference_ops():
        batch = Batch(logits.expand(count, -1), [choice], slots=slots, positions=torch.arange(count))
        return batch.run()[0].long()


def oracle(logits: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Probabilities in float64 after every filter, by sorting."""
    values = logits.double() / choice.temperature
    if 0 < choice.top_k < len(values):
        values = values.masked_fill(values < values.sort(descending=True)[0][choice.top_k - 1], -INF)
    p = values.softmax(0)
    p = torch.where(p >= choice.min_p * p.max(), p, 0)
    p /= p.sum()
    if choice.top_p < 1:
        ordered = p.sort(descending=True)[0]
        border = ordered[(ordered.cumsum(0) < choice.top_p - 1e-9).sum()]
        p = torch.where(p >= border * (1 - 1e-9), p, 0)
    return p / p.sum()


def some_logits(vocab: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


# ---- the reference against the oracle -------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", FILTERS)
@pytest.mark.parametrize("vocab", [7, 50])
def test_tokens_come_as_often_as_their_probability_says(vocab: int, choice: Choice) -> None:
    count, p = 20000, oracle(some_logits(vocab), choice)
    seen = draws(some_logits(vocab), choice, count).bincount(minlength=vocab)
    assert not seen[p == 0].any()
    expected = p[p > 0] * count
    chi_square = ((seen[p > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 1e-9  # five standard deviations


@pytest.mark.parametrize("choice", FILTERS)
@pytest.mark.parametrize("vocab", [7, 1000, 49152, 128256])
def test_the_kept_set_is_the_oracle_s(vocab: int, choice: Choice) -> None:
    logits = some_logits(vocab, seed=vocab).unsqueeze(0)
    table = SamplingTable.allocate(1)
    table.assign([0], [choice])
    distance = sampler.distances(logits.max(), logits, torch.tensor([[choice.temperature]]))
    threshold = sampler._threshold(distance, sampler.weights(distance), table, torch.tensor([0]))
    kept, p = (distance <= threshold)[0], oracle(logits[0], choice)
    doubtful = kept != (p > 0)
    border = logits[0].double()[kept].min()
    assert doubtful.sum() <= 2 and ((logits[0].double()[doubtful] - border).abs() < 1e-4).all()


@pytest.mark.parametrize("choice", FILTERS)
@pytest.mark.parametrize("vocab", [7, 1000, 49152])
def test_a_token_is_where_the_oracle_s_distribution_passes_the_random_number(vocab: int, choice: Choice) -> None:
    logits, count = some_logits(vocab, seed=1), 64
    uniform = random62(torch.tensor(choice.seed), torch.arange(count)).double() / 2.0**62
    running = oracle(logits, choice).cumsum(0)
    tokens = draws(logits, choice, count)
    low = torch.where(tokens > 0, running[tokens - 1], 0)
    assert (uniform >= low - 1e-5).all() and (uniform <= running[tokens] + 1e-5).all()


def test_temperature_comes_before_the_filters() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    flat, sharp = (set(draws(logits, Choice(t, top_p=0.8), 300).tolist()) for t in (2.0, 0.3))
    assert flat == {0, 1, 2} and sharp == {0}


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_with_the_last_kept_token_are_kept(dtype: torch.dtype) -> None:
    logits = torch.tensor([1.0, 5.0, 3.0, 3.0, 3.0, 0.0]).to(dtype)
    assert set(draws(logits, Choice(100.0, top_k=2), 400).tolist()) == {1, 2, 3, 4}
    assert set(draws(torch.zeros(6, dtype=dtype), Choice(top_p=0.2), 400).tolist()) == set(range(6))
    assert set(draws(logits, Choice(100.0, min_p=math.exp(-0.02) - 1e-6), 400).tolist()) == {1, 2, 3, 4}


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, -3.0, 2.0], [-0.0, 0.0, -1.0, -1.0], [-1.0, -2.0, 0.0, -0.0]])
    assert Batch(logits, [Choice(0.0)] * 3).run()[0].tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "choice", [Choice(1e-5), Choice(1e-38), Choice(top_p=1e-6), Choice(top_p=0.0), Choice(top_k=1)]
)
@pytest.mark.parametrize("vocab", [7, 1000])
def test_extremes_that_leave_the_best_token(vocab: int, choice: Choice) -> None:
    logits = some_logits(vocab)
    assert (draws(logits, choice, 50) == logits.argmax()).all()
    assert (draws(logits, Choice(min_p=1.0), 50) == logits.argmax()).all()


def test_a_high_temperature_is_nearly_uniform() -> None:
    seen = draws(some_logits(8), Choice(1e4), 8000).bincount(minlength=8)
    assert (seen - 1000).abs().max() < 5 * math.sqrt(1000)
    assert set(draws(some_logits(8), Choice(INF), 400).tolist()) == set(range(8))


@pytest.mark.parametrize(
    "choice", [Choice(top_k=50), Choice(top_k=2**40), Choice(top_k=-1), Choice(top_p=1.5), Choice(min_p=-1)]
)
def test_values_beyond_the_range_switch_a_filter_off(choice: Choice) -> None:
    assert torch.equal(draws(some_logits(50), choice, 300), draws(some_logits(50), Choice(), 300))


def test_the_random_numbers_of_seeds_and_positions_are_independent() -> None:
    logits = torch.zeros(2)
    by_seed = torch.stack([draws(logits, Choice(seed=seed), 512) for seed in range(32)]).double()
    assert abs(by_seed.mean() - 0.5) < 5 * 0.5 / math.sqrt(by_seed.numel())
    correlation = torch.corrcoef(by_seed) - torch.eye(32)
    assert correlation.abs().max() < 6 / math.sqrt(512)


# ---- every body: reference and CPU library --------------------------------------------------------------------------


def _reference() -> Any:
    return native.reference_ops()


@pytest.fixture(params=["reference", *ISAS])
def body(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """A context in which `sample` runs one body."""
    return _reference if request.param == "reference" else lambda: using(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_logits_are_never_drawn_and_hopeless_rows_yield_a_defined_token(
    body: Callable[[], Any], dtype: torch.dtype
) -> None:
    rows = {
        (-INF, 1.0, NAN, 1.0): {1, 3},
        (-INF, -INF, -INF, -INF): {0},
        (NAN, NAN, NAN, NAN): {0},
        (NAN, -INF, 0.0, -INF): {2},
        (0.0, INF, INF, NAN): {1},
        (3e4, -3e4, -INF, NAN): {0},
    }
    logits = torch.tensor([list(row) for row in rows], dtype=dtype)
    with body():
        for choice in (Choice(0.0), *FILTERS, Choice(1e-5), Choice(1e4), Choice(INF)):
            batch = Batch(logits, [choice] * len(rows), positions=torch.arange(len(rows)))
            tokens, logprobs, _ = batch.run()
            assert all(token in allowed for token, allowed in zip(tokens.tolist(), rows.values(), strict=True))
            assert not logprobs.isnan().any()


def test_suppressed_ids_are_never_drawn(body: Callable[[], Any]) -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 9.5]]).repeat(4, 1)
    logits[2] = -INF
    options = {
        "suppress": torch.tensor([1, 0, 1, -1], dtype=torch.int32),
        "suppress_ids": torch.tensor([3, 0, 77, -1], dtype=torch.int32),
    }
    with body():
        tokens, logprobs, _ = Batch(logits, [Choice(0.0)] * 4, options).run()
        assert tokens.tolist() == [1, 3, 1, 1]
        assert logprobs[0] == pytest.approx(torch.tensor([8.0, 7.0]).log_softmax(0)[0].item(), abs=1e-5)
        for seed in range(50):
            drawn = Batch(logits, [Choice(5.0, seed=seed)] * 4, options).run()[0].tolist()
            assert {drawn[0], drawn[2], drawn[3]} <= {1, 2}
        options["suppress_ids"] = torch.arange(4, dtype=torch.int32)  # everything: still a token of the vocabulary
        assert Batch(logits, [Choice()] * 4, options).run()[0][0] == 0


def test_padding_is_left_alone(body: Callable[[], Any]) -> None:
    logits, slots = torch.randn(6, 100), torch.tensor([4, -1, 0, 2, 1, 3])
    counts = torch.zeros(abi.COUNTS, dtype=torch.int32)
    counts[abi.NUM_SAMPLES] = 4
    with body():
        tokens, logprobs, last_token = Batch(logits, [Choice()] * 5, {"counts": counts}, slots=slots).run()
    written = [0, 2, 3]
    assert [i for i, token in enumerate(tokens) if token != -9] == written
    assert [i for i, logprob in enumerate(logprobs) if logprob != -9] == written
    assert last_token[slots[written]].tolist() == tokens[written].tolist()
    assert (last_token[[1, 3]] == -9).all()


@pytest.mark.parametrize("choice", [Choice(0.0), Choice(0.5, top_p=0.9)])
def test_logprobs_are_those_of_the_raw_logits(body: Callable[[], Any], choice: Choice) -> None:
    logits = 5 * torch.randn(5, 1000)
    with body():
        tokens, logprobs, _ = Batch(logits, [choice] * 5).run()
    expected = logits.double().log_softmax(1).gather(1, tokens.long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_draw_depends_on_its_own_row_alone(body: Callable[[], Any]) -> None:
    rows, order = 24, list(range(24))
    random.Random(0).shuffle(order)
    logits = 3 * torch.randn(rows, 3000).bfloat16()
    choices = [Choice(0.9, 0.95, 0.001, 100, seed) if seed % 3 else Choice(0.0) for seed in range(rows)]
    positions = torch.arange(rows) * 7
    with body():
        together = Batch(logits, choices, positions=positions).run()[0]
        shuffled = Batch(logits[order], choices, slots=torch.tensor(order), positions=positions[order]).run()[0]
        alone = [Batch(logits[r : r + 1], choices[r : r + 1], positions=positions[r : r + 1]).run()[0] for r in order]
    assert torch.equal(together[order], shuffled)
    assert torch.equal(torch.cat(alone), shuffled)


# ---- native libraries against the reference, bit for bit ------------------------------------------------------------


def mixed_logits(rows: int, vocab: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of every character: peaked, flat, tied, wild, with impossible tokens, hopeless."""
    logits = torch.randn(rows, vocab, generator=generator)
    for r in range(rows):
        kind = r % 8
        if kind == 0:
            logits[r] = 3 * logits[r] + 15 * (torch.rand(vocab, generator=generator) > 0.999)
        elif kind == 1:
            logits[r] = logits[r].round()
        elif kind == 2:
            logits[r] = 2.5
        elif kind == 3:
            logits[r] *= 1e4
        elif kind == 4:
            logits[r, torch.rand(vocab, generator=generator) < 0.5] = -INF
            logits[r, torch.rand(vocab, generator=generator) < 0.1] = NAN
        elif kind == 5 and r > 8:
            logits[r] = -INF if r % 3 else NAN
    return logits


def mixed_batch(rows: int, vocab: int, dtype: torch.dtype, seed: int, device: str = "cpu", shift: int = 0) -> Batch:
    """Rows of mixed logits and parameters, in rows that start `shift` elements past an aligned address."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    logits = torch.zeros(rows, vocab + shift + 3, dtype=dtype, device=device)[:, shift : shift + vocab]
    logits.copy_(mixed_logits(rows, vocab, generator))
    choices = [
        Choice(
            choose.choice([0.0, 0.7, 1.0, 1.0, 1e-5, 100.0]),
            choose.choice([1.0, 0.9, 0.9, 0.5, 0.999, 1e-6]),
            choose.choice([0.0, 0.0, 0.1, 1e-4]),
            choose.choice([0, 0, 0, 1, 50, 1000]),
            choose.getrandbits(64),
        )
        for _ in range(rows + 2)
    ]
    slots = torch.tensor(choose.sample(range(rows + 2), rows))
    options = {
        "suppress": torch.randint(0, 2, (rows,), generator=generator, dtype=torch.int32).to(device),
        "suppress_ids": torch.randint(0, vocab, (3,), generator=generator, dtype=torch.int32).to(device),
    }
    positions = torch.randint(0, 100000, (rows,), generator=generator)
    return Batch(logits, choices, options, slots=slots, positions=positions)


def check_kernel(batch: Batch) -> None:
    """The native body's tokens are the reference's; it does not fall back to it."""
    with mock.patch.object(sampler, "sample_reference", side_effect=AssertionError("no kernel for these arguments")):
        tokens, logprobs, last_token = batch.run()
    with native.reference_ops():
        expected, expected_logprobs, expected_last = batch.run()
    assert torch.equal(tokens, expected)
    assert torch.equal(last_token, expected_last)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_cpu_library_draws_the_tokens_of_the_reference(vocab: int, dtype: torch.dtype, isa: str) -> None:
    rows = 24 if vocab <= 1000 else 9
    with using(isa):
        check_kernel(mixed_batch(rows, vocab, dtype, seed=vocab))
        check_kernel(mixed_batch(1, vocab, dtype, seed=vocab + 1, shift=1))


# ---- the table and the checks ---------------------------------------------------------------------------------------


def test_a_table_keeps_what_is_assigned_and_starts_greedy() -> None:
    table = SamplingTable.allocate(4)
    table.assign([3, 1], [Choice(0.5, 0.25, 0.125, 7, 2**64 - 2), Choice(seed=2**63 - 1)])
    assert table.temperature.tolist() == [0.0, 1.0, 0.0, 0.5]
    assert table.top_p.tolist() == [1.0, 1.0, 1.0, 0.25]
    assert table.min_p.tolist() == [0.0, 0.0, 0.0, 0.125]
    assert table.top_k.tolist() == [0, 0, 0, 7]
    assert table.seed.tolist() == [0, 2**63 - 1, 0, -2]
    table.assign([], [])
    with pytest.raises(ValueError, match="2 slots were given with 1 parameter sets"):
        table.assign([0, 1], [Choice()])


def test_arguments_that_do_not_fit_are_refused_with_the_reason() -> None:
    table, tokens = SamplingTable.allocate(2), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="logits must be float32"):
        sample(tokens, torch.zeros(2, 5, dtype=torch.float64), table, tokens, tokens)
    with pytest.raises(ValueError, match=r"positions must be int32 of shape \[2\]"):
        sample(tokens, torch.zeros(2, 5), table, tokens, tokens.long())
    with pytest.raises(ValueError, match="give those ids too"):
        sample(tokens, torch.zeros(2, 5), table, tokens, tokens, suppress=tokens)
    with pytest.raises(ValueError, match="0 columns"):
        sample(tokens, torch.zeros(2, 0), table, tokens, tokens)
