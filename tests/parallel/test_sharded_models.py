"""A model that is divided among ranks says what it says on one: every family and option, in float32."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mii.batching.data_classes import EngineRequest, SamplingParams, TokenLogprob
from mii.errors import PlacementError
from mii.parallel.group import Group
from tests.oracle import assert_greedy_but_for_ties, generate, random_prompts, small_engine
from tests.parallel.threads import ranked_engine
from tests.variants import Variant, all_variants, deepseek_v2

LENGTHS = [1, 17, 40]


@pytest.mark.parametrize("variant", all_variants(), ids=str)
def test_greedy_tokens_of_every_variant_on_two_ranks_equal_one_ranks(variant: Variant, tmp_path: Path) -> None:
    folder = variant.make(tmp_path)
    engine = small_engine(folder)
    prompts = random_prompts(engine.vocab_size, LENGTHS)
    expected = generate(engine, prompts, 16)
    engine.destroy()
    with ranked_engine(folder, 2) as first:
        given = generate(first, prompts, 16)  # type: ignore[arg-type]
    # Sums over ranks are rounded in another order, so two tokens that are equally likely may change places.
    different = [index for index in range(len(prompts)) if given[index] != expected[index]]
    for index in different:
        assert_greedy_but_for_ties(variant.oracle(folder), prompts[index], given[index], "fp32")
    assert len(different) <= 1


@pytest.mark.parametrize("size", [2, 4, 9])
def test_nine_heads_that_share_three_key_heads_are_divided_unevenly(
    size: int, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint(**NINE_HEADS)
    engine = small_engine(folder)
    prompts = random_prompts(engine.vocab_size, LENGTHS)
    expected = generate(engine, prompts, 16)
    engine.destroy()
    with ranked_engine(folder, size) as first:
        assert generate(first, prompts, 16) == expected  # type: ignore[arg-type]


NINE_HEADS: dict[str, Any] = {
    "hidden_size": 288,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "attention_bias": True,
    "mlp_bias": True,
}
LATENTS: dict[str, Any] = {
    **deepseek_v2.SIZES,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 56,
    "attention_bias": True,
    "mlp_bias": True,
}


def test_heads_out_of_latents_are_divided_among_four_ranks(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(model_type="deepseek_v2", **LATENTS)
    engine = small_engine(folder)
    prompts = random_prompts(engine.vocab_size, LENGTHS)
    expected = generate(engine, prompts, 16)
    engine.destroy()
    with ranked_engine(folder, 4) as first:
        assert generate(first, prompts, 16) == expected  # type: ignore[arg-type]


SPECIAL = [
    {"sampling": SamplingParams(temperature=0.8, top_p=0.9, seed=3)},
    {"sampling": SamplingParams(temperature=1.3, top_k=20, min_p=0.01, seed=4)},
    {"sampling": SamplingParams(repetition_penalty=1.7, frequency_penalty=0.5, presence_penalty=0.3)},
    {"sampling": SamplingParams(temperature=1.0, seed=9, logit_bias={5: 4.0, 250: 6.0, 100: -100.0})},
    {"sampling": SamplingParams(temperature=1.0, seed=2, allowed_ids=(7, 130, 255, 256))},
    {"logprobs": 3, "prompt_logprobs": 2, "sampling": SamplingParams(temperature=0.7, seed=1)},
    {"min_new_tokens": 8, "stop_ids": tuple(range(200)), "sampling": SamplingParams(temperature=2.0, seed=6)},
    {"logprobs": 0},
]


def answers(engine: Any) -> dict[int, tuple[list[int], list[TokenLogprob], list[TokenLogprob]]]:
    prompts = random_prompts(engine.vocab_size, [5 + 7 * index for index in range(len(SPECIAL))])
    for uid, (prompt, options) in enumerate(zip(prompts, SPECIAL, strict=True)):
        engine.add_request(EngineRequest(uid=uid, prompt_ids=prompt, max_new_tokens=20, **options))
    found: dict[int, tuple[list[int], list[TokenLogprob], list[TokenLogprob]]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens, logprobs, prompt = found.setdefault(output.uid, ([], [], []))
            tokens += output.token_ids
            logprobs += output.logprobs or []
            prompt += output.prompt_logprobs or []
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_whatever_requests_ask_of_the_logits_is_the_same_on_several_ranks(
    size: int, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint(**NINE_HEADS)
    engine = small_engine(folder)
    expected = answers(engine)
    engine.destroy()
    with ranked_engine(folder, size) as first:
        given = answers(first)
    for uid, (tokens, *entries) in expected.items():
        assert given[uid][0] == tokens, SPECIAL[uid]
        for theirs, ours in zip(entries, given[uid][1:], strict=True):
            assert len(theirs) == len(ours)
            for one, other in zip(theirs, ours, strict=True):
                assert_alike(one, other)


def assert_alike(one: TokenLogprob, other: TokenLogprob) -> None:
    assert one.token_id == other.token_id
    assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert [each.token_id for each in one.top] == [each.token_id for each in other.top]
    assert [each.logprob for each in one.top] == pytest.approx([each.logprob for each in other.top], abs=1e-4)


def test_smollm2_says_the_same_on_two_and_on_four_ranks(smollm2: Path) -> None:
    prompt = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    engine = small_engine(smollm2, blocks=32)
    expected = generate(engine, [prompt], 6)
    engine.destroy()
    for size in (2, 4):
        with ranked_engine(smollm2, size, blocks=32) as first:
            assert generate(first, [prompt], 6) == expected  # type: ignore[arg-type]


def test_more_ranks_than_heads_are_refused_with_what_would_do(tiny_llama: Path) -> None:
    with pytest.raises(PlacementError, match=r"has 3 attention heads.*use 1 to 3"), ranked_engine(tiny_llama, 4):
        pass


IN_HALVES = ("Llama-heads_of_64", "Qwen3-biases", "GPT-2-plain")
AT_ONCE = ("Bloom-normed", "Gemma_2-soft", "OPT-post-norm", "Mixtral-one")  # no steps in halves, whoever asks


class LateSum:
    """A sum that comes when it is taken."""

    def __init__(self, group: Group, tensor: torch.Tensor) -> None:
        self.group, self.tensor = group, tensor

    def wait(self) -> None:
        self.group.all_reduce(self.tensor)

    def norm(self, norm: ctypes.Structure) -> bool:
        self.wait()
        return False


@pytest.mark.parametrize(
    "variant", [each for each in all_variants() if str(each).startswith(IN_HALVES + AT_ONCE)], ids=str
)
def test_steps_in_halves_say_the_same_however_late_sums_come(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = variant.make(tmp_path)
    with ranked_engine(folder, 2) as first:
        prompts = random_prompts(first.vocab_size, LENGTHS)
        expected = generate(first, prompts, 16)  # type: ignore[arg-type]
    begun = []

    def start(group: Group, tensor: torch.Tensor) -> LateSum:
        begun.append(len(tensor))
        return LateSum(group, tensor)

    monkeypatch.setattr(Group, "overlaps", lambda group, num_bytes, captured: True)
    monkeypatch.setattr(Group, "start_all_reduce", start)
    with ranked_engine(folder, 2) as first:
        assert generate(first, prompts, 16) == expected  # type: ignore[arg-type]
        assert bool(begun) == bool(first.runner.model.halves(2))
    assert bool(begun) == str(variant).startswith(IN_HALVES)
