"""Log-probabilities against log_softmax, penalties against transformers and the formula of the OpenAI documentation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from mii.ops.logits import Bias, PenaltyTable, apply_penalties, best_together, penalize_together, score

INF, NAN = float("inf"), float("nan")
DEVICE = "cpu"


@dataclass(frozen=True)
class Penalties:
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


def penalized(logits: torch.Tensor, table: PenaltyTable, slots: list[int]) -> torch.Tensor:
    out = torch.full_like(logits, NAN, dtype=torch.float32)
    apply_penalties(out, logits, torch.tensor(slots, dtype=torch.int32, device=logits.device), table=table)
    return out


def check_scores(device: str, dtype: torch.dtype, vocab: int) -> None:
    logits = (3 * torch.randn(9, vocab, device=device)).to(dtype)
    k, chosen = min(20, vocab), torch.randint(0, vocab, (9,), device=device)
    scores = score(logits, chosen.int(), k)
    expected = logits.double().log_softmax(1)
    torch.testing.assert_close(scores.top.double(), expected.topk(k, dim=1).values, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scores.top.double(), expected.gather(1, scores.top_ids.long()), atol=1e-6, rtol=1e-6)
    order = torch.sort(logits.float(), dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(scores.top_ids.long(), order)  # equal logits in the order of ids
    assert (scores.chosen - expected.gather(1, chosen.unsqueeze(1)).squeeze(1)).abs().max() < 2e-6
    for row in range(9):  # whoever else is asked about, and however many alternatives others want
        alone = score(logits[row : row + 1], chosen[row : row + 1], k // 2)
        assert torch.equal(alone.chosen, scores.chosen[row : row + 1])
        assert torch.equal(alone.top, scores.top[row : row + 1, : k // 2])
        assert torch.equal(alone.top_ids, scores.top_ids[row : row + 1, : k // 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 1000, 128256])
def test_scores_are_those_of_a_stable_sort_and_of_each_row_alone(vocab: int, dtype: torch.dtype) -> None:
    check_scores(DEVICE, dtype, vocab)


def test_impossible_tokens_come_last_and_hopeless_rows_have_no_nan() -> None:
    logits = torch.tensor([[NAN, 1.0, -INF, 1.0], [-INF] * 4, [NAN] * 4, [0.0, INF, -0.0, 1.0]])
    chosen, values, ids = score(logits, torch.tensor([0, 1, 2, 0]), 4)
    assert ids.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3], [1, 3, 0, 2]]
    assert not values.isnan().any() and values[1].eq(-INF).all() and values[3].tolist() == [0, -INF, -INF, -INF]
    assert values[0, 0] == pytest.approx(-0.693147, abs=1e-6)
    assert chosen.eq(-INF).all()


def test_the_search_that_looks_at_no_value_finds_the_same() -> None:
    logits = (3 * torch.randn(9, 1000)).bfloat16().float()  # many are equal
    logits[0, 5:], logits[1] = -INF, 0.0
    logits[2, 7], logits[2, 9], logits[3, ::2] = INF, INF, -0.0
    assert torch.equal(best_together(logits, 50).int(), score(logits, torch.zeros(9), 50).top_ids)


def test_no_alternatives_may_be_asked_for_and_more_than_there_are_tokens_may_not() -> None:
    assert score(torch.zeros(2, 4), torch.tensor([3, 0]), 0).chosen.tolist() == pytest.approx([-1.386294] * 2)
    with pytest.raises(ValueError, match="the vocabulary allows 0 to 5"):
        score(torch.zeros(1, 5), torch.tensor([0]), 6)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits, prompt, answer = 4 * torch.randn(1, 200), [3, 5, 5, 190], [7, 3, 7]
    table = PenaltyTable.allocate(3, 200)
    table.assign(2, Penalties(repetition_penalty=penalty), prompt, answer)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), logits.clone())
    torch.testing.assert_close(penalized(logits, table, [2]), expected, atol=0, rtol=0)


def test_frequency_and_presence_count_the_answer_alone() -> None:
    logits = torch.randn(1, 10)
    table = PenaltyTable.allocate(1, 10)
    table.assign(0, Penalties(frequency_penalty=0.5, presence_penalty=-0.25), [1, 2, 3], [3, 4, 4, 4])
    counts = torch.tensor([0, 0, 0, 1, 3, 0, 0, 0, 0, 0])
    expected = logits - 0.5 * counts + 0.25 * (counts > 0)
    torch.testing.assert_close(penalized(logits, table, [0]), expected)


def test_each_row_has_its_slot_s_penalties_and_a_new_request_starts_afresh() -> None:
    logits = torch.randn(3, 20).bfloat16()
    table = PenaltyTable.allocate(4, 20)
    table.assign(1, Penalties(presence_penalty=1.0), [], [5])
    table.assign(3, Penalties(repetition_penalty=2.0), [6])
    out = penalized(logits, table, [3, 0, 1])
    assert torch.equal(out[1], logits[1].float())
    assert (out != logits.float()).nonzero().tolist() == [[0, 6], [2, 5]]
    table.assign(1, Penalties(frequency_penalty=1.0), [])
    assert torch.equal(penalized(logits, table, [0, 0, 1]), logits.float())


def test_penalties_of_all_rows_together_are_those_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    table, logits = PenaltyTable.allocate(5, 300), 4 * torch.randn(5, 300, generator=generator)
    for slot in range(5):
        prompt, answer = torch.randint(0, 300, (2, 60), generator=generator).tolist()
        table.assign(slot, Penalties(0.5 + slot / 2, 0.3 * slot, 0.7 - slot), prompt[: slot * 15], answer)
    logits[1, :50], logits[2, :50], logits[3, :50] = -0.0, INF, -INF
    together = logits.clone()
    penalize_together(together, table, torch.tensor([3, 0, 4, 1, 1]))
    assert torch.equal(together, penalized(logits, table, [3, 0, 4, 1, 1]))


def test_recorded_tokens_count_and_padding_does_not() -> None:
    table = PenaltyTable.allocate(4, 10)
    table.assign(2, Penalties(), [0], [9])
    for _ in range(2):
        table.record(torch.tensor([2, -1, 0], dtype=torch.int32), torch.tensor([9, 4, 3], dtype=torch.int32))
    assert table.counts.nonzero().tolist() == [[0, 3], [2, 9]]
    assert table.counts[2, 9] == 3 and table.counts[0, 3] == 2


def test_biases_add_and_masks_leave_only_what_they_allow() -> None:
    logits, slots = torch.randn(2, 6), torch.zeros(2, dtype=torch.int32)
    bias = Bias.of([{}, {2: 5.0, 4: -100.0}], 6)
    allowed = torch.tensor([[True] * 6, [False, False, True, False, True, False]])
    out = torch.empty(2, 6)
    apply_penalties(out, logits, slots, bias=bias, allowed=allowed)
    assert torch.equal(out[0], logits[0])
    expected = torch.tensor([-INF, -INF, logits[1, 2] + 5, -INF, logits[1, 4] - 100, -INF])
    assert torch.equal(out[1], expected)
    apply_penalties(logits, logits, slots, bias=Bias.of([{}, {}], 6), allowed=allowed)  # in place
    assert logits[1].isinf().sum() == 4


def test_bad_arguments_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="logit_bias names token 6; the vocabulary has tokens 0 to 5"):
        Bias.of([{6: 1.0}], 6)
    logits = torch.zeros(2, 6, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="out must be float32"):
        apply_penalties(logits, logits, torch.zeros(2, dtype=torch.int32))


def test_a_table_grows_without_losing_what_it_holds() -> None:
    logits, table = torch.randn(1, 20), PenaltyTable.allocate(2, 20)
    table.assign(1, Penalties(1.5, 0.25, 0.5), [3, 4], [5, 5])
    before = penalized(logits, table, [1])
    larger = table.grown(5)
    assert larger.slots == 5
    assert torch.equal(penalized(logits, larger, [1]), before)
    assert torch.equal(penalized(logits, larger, [4]), logits)
