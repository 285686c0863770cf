"""The options of a call: what is accepted, and what they come to for one prompt."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mii.batching.data_classes import EngineRequest, SamplingParams
from mii.config import GenerateParamsConfig
from mii.errors import EmptyPromptError, PromptTooLongError
from mii.validation import explain

ENDS = (2, 32000)


def refusal(**options: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        GenerateParamsConfig(**options)
    return explain(caught.value)


def request(prompt_ids: list[int], limit: int = 100, **options: Any) -> EngineRequest:
    params = GenerateParamsConfig(**options)
    return params.engine_request(7, prompt_ids, max_length=limit, stop_ids=ENDS, seeds=random.Random(0))


def test_the_defaults_are_those_of_the_contract() -> None:
    assert GenerateParamsConfig().model_dump() == {
        "prompt_length": None,
        "max_length": None,
        "max_new_tokens": None,
        "min_new_tokens": 0,
        "stream": False,
        "ignore_eos": False,
        "return_full_text": False,
        "do_sample": True,
        "temperature": None,
        "top_k": None,
        "top_p": 0.9,
        "min_p": 0.0,
        "seed": None,
        "stop": [],
        "stop_token_ids": [],
        "skip_special_tokens": False,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "allowed_token_ids": None,
        "logprobs": None,
        "prompt_logprobs": None,
    }


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("max_new_tokens", 0, "must be greater than or equal to 1"),
        ("max_new_tokens", -5, "must be greater than or equal to 1"),
        ("max_new_tokens", True, "a number is needed, not True or False"),
        ("max_new_tokens", 1.5, "must be a valid integer"),
        ("min_new_tokens", -1, "must be greater than or equal to 0"),
        ("max_length", 0, "must be greater than or equal to 1"),
        ("max_length", "many", "must be a valid integer"),
        ("temperature", -0.1, "0 is greedy"),
        ("temperature", float("inf"), "must be a finite number"),
        ("top_k", 0, "None turns it off"),
        ("top_k", -1, "None turns it off"),
        ("top_p", 0.0, "1 turns it off"),
        ("top_p", 1.1, "1 turns it off"),
        ("top_p", None, "1 turns it off"),
        ("min_p", 1.1, "0 turns it off"),
        ("seed", -1, "must be from 0 to 2**63 - 1"),
        ("do_sample", 2, "must be a valid boolean"),
        ("stop", 5, "must be a valid list"),
        ("stop", [""], "an empty text would end every answer at once"),
        ("stop", "", "an empty text would end every answer at once"),
        ("stop_token_ids", 5, "must be a valid list"),
        ("repetition_penalty", 0, "1 turns it off"),
        ("repetition_penalty", float("inf"), "must be a finite number"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("frequency_penalty", -2.1, "from -2 to 2"),
        ("frequency_penalty", None, "0 turns it off"),
        ("logit_bias", [5], "must be a valid dictionary"),
        ("logit_bias", {"x": 1}, "it has the key 'x'; its keys are token ids"),
        ("logit_bias", {-1: 1}, "it has the key -1"),
        ("logit_bias", {True: 1}, "it has the key True"),
        ("logit_bias", {1.0: 1}, "it has the key 1.0"),
        ("logit_bias", {str(2**31): 1}, "it has the key '2147483648'"),
        ("logit_bias", {"9" * 5000: 1}, "it has the key '9999"),
        ("logit_bias", {"5": 1, 5: 2}, "a token is named twice, as a number and as a text"),
        ("allowed_token_ids", [], "no token would be left to choose; None allows all"),
        ("logprobs", True, "a number is needed, not True or False"),
        ("logprobs", 101, "must be less than or equal to 100"),
        ("prompt_logprobs", -1, "must be greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(option: str, value: object, words: str) -> None:
    message = refusal(**{option: value})
    assert message.startswith(f"{option}=")
    assert words in message


def test_a_misspelt_option_gets_the_nearest_name_and_others_apis_names_get_ours() -> None:
    assert refusal(max_new_token=3) == "unknown option 'max_new_token'; did you mean 'max_new_tokens'?"
    assert refusal(max_tokens=3) == "unknown option 'max_tokens'; use max_new_tokens"
    assert refusal(n=2) == "unknown option 'n'; give the prompt n times: pipe([prompt] * n)"
    assert refusal(best_of=2) == "unknown option 'best_of'; mii does not do this"
    assert refusal(repitition_penalty=2) == "unknown option 'repitition_penalty'; did you mean 'repetition_penalty'?"
    assert refusal(freq_penalty=2) == "unknown option 'freq_penalty'; did you mean 'frequency_penalty'?"
    assert refusal(allowed_tokens=[2]) == "unknown option 'allowed_tokens'; did you mean 'allowed_token_ids'?"
    assert refusal(top_logprobs=2).startswith("unknown option 'top_logprobs'; use logprobs=n")
    assert "options are: max_length, max_new_tokens" in refusal(zzz=1)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, []),
        ("\n\n", ["\n\n"]),
        (["b", "a"], ["a", "b"]),
        (("b", "a"), ["a", "b"]),
        ({"x"}, ["x"]),
        ("auto", ["auto"]),
        (["auto"], ["auto"]),
    ],
)
def test_stop_is_a_text_or_several(given: Any, kept: list[str]) -> None:
    assert GenerateParamsConfig(stop=given).stop == kept


def test_a_stop_that_is_no_text_is_refused() -> None:
    assert "stop[1]=5 must be a valid string" in refusal(stop=["a", 5])


@pytest.mark.parametrize(
    ("options", "prompt", "limit", "new_tokens"),
    [
        ({}, 10, 64, 54),
        ({"max_new_tokens": 5}, 10, 64, 5),
        ({"max_new_tokens": 500}, 10, 64, 54),
        ({"max_length": 32}, 10, 64, 22),
        ({"max_length": 500}, 10, 64, 54),
        ({"max_length": 32, "max_new_tokens": 22}, 10, 64, 22),
        ({"max_length": 32, "max_new_tokens": 23}, 10, 64, 22),
        ({"max_length": 11}, 10, 64, 1),
        ({"max_new_tokens": 5}, 63, 64, 1),
    ],
)
def test_max_length_bounds_prompt_plus_answer_exactly(
    options: dict[str, int], prompt: int, limit: int, new_tokens: int
) -> None:
    assert GenerateParamsConfig(**options).resolve(prompt, limit) == new_tokens


@pytest.mark.parametrize(("options", "limit"), [({}, 10), ({"max_length": 10}, 64), ({"max_length": 9}, 64)])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(options: dict[str, int], limit: int) -> None:
    shown = min(limit, options.get("max_length", limit))
    with pytest.raises(PromptTooLongError, match=rf"the prompt has 10 tokens .* may have {shown} \(max_length\)"):
        GenerateParamsConfig(**options).resolve(10, limit)


def test_a_config_made_for_one_prompt_checks_and_fills_its_length() -> None:
    assert GenerateParamsConfig(prompt_length=10, max_length=64).max_new_tokens == 54
    assert GenerateParamsConfig(prompt_length=10, max_length=64, max_new_tokens=3).max_new_tokens == 3
    assert "the prompt has 64 tokens" in refusal(prompt_length=64, max_length=64)


@given(
    prompt=st.integers(1, 200),
    limit=st.integers(1, 200),
    max_length=st.none() | st.integers(1, 200),
    max_new_tokens=st.none() | st.integers(1, 200),
    min_new_tokens=st.integers(0, 200),
)
def test_no_combination_of_lengths_passes_a_limit_or_asks_for_nothing(
    prompt: int, limit: int, max_length: int | None, max_new_tokens: int | None, min_new_tokens: int
) -> None:
    bound = limit if max_length is None else min(limit, max_length)
    options = {"max_length": max_length, "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    if prompt >= bound:
        with pytest.raises(PromptTooLongError):
            request([1] * prompt, limit, **options)
        return
    made = request([1] * prompt, limit, **options)
    assert 1 <= made.max_new_tokens <= bound - prompt
    assert made.max_new_tokens == min(bound - prompt, max_new_tokens or bound)
    assert made.min_new_tokens == min(min_new_tokens, made.max_new_tokens)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"do_sample": False}, {"temperature": 1e-9, "top_k": 5}])
def test_temperature_zero_and_no_sampling_are_greedy(options: dict[str, Any]) -> None:
    assert request([1], **options, seed=3).sampling == SamplingParams(temperature=0.0)


def test_sampling_options_reach_the_engine_with_off_as_its_numbers() -> None:
    assert request([1], seed=5).sampling == SamplingParams(1.0, 0, 0.9, 0.0, 5)
    options = {"temperature": 0.7, "top_k": 40, "top_p": 1, "min_p": 0.05, "seed": 2**63 - 1}
    assert request([1], **options).sampling == SamplingParams(0.7, 40, 1.0, 0.05, 2**63 - 1)


def test_a_call_without_a_seed_draws_one_from_the_generator_for_each_prompt() -> None:
    params = GenerateParamsConfig()
    one, two = random.Random(1), random.Random(1)
    seeds = [params.sampling(one).seed for _ in range(5)]
    assert seeds == [params.sampling(two).seed for _ in range(5)]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_end_of_text_ends_the_answer_unless_it_is_ignored() -> None:
    assert request([1]).stop_ids == ENDS
    assert request([1], stop="x").stop_ids == ENDS
    assert request([1], ignore_eos=True).stop_ids == ()


def test_tokens_to_stop_at_are_added_to_the_ends_of_text_and_hold_without_them() -> None:
    assert request([1], stop_token_ids=[9, 2]).stop_ids == (*ENDS, 9)
    assert request([1], stop_token_ids=(9,), ignore_eos=True).stop_ids == (9,)
    assert request([1], stop_token_ids=None).stop_ids == ENDS


@pytest.mark.parametrize("greedy", [{}, {"temperature": 0}, {"do_sample": False}])
def test_what_changes_logits_reaches_the_engine_greedy_or_not(greedy: dict[str, Any]) -> None:
    plain = request([1], **greedy).sampling
    assert not plain.changes_logits
    options = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    made = request([1], **greedy, **options, logit_bias={"7": 1, 8: -2.5}, allowed_token_ids={9, 7}).sampling
    assert {name: getattr(made, name) for name in options} == options
    assert (made.logit_bias, made.allowed_ids) == ({7: 1.0, 8: -2.5}, (7, 9))
    assert made.changes_logits
    assert made.temperature == plain.temperature
    assert request([1], logit_bias=None, allowed_token_ids=None).sampling.changes_logits is False


def test_log_probabilities_are_asked_for_by_the_request() -> None:
    made = request([1], logprobs=0, prompt_logprobs=5)
    assert (made.logprobs, made.prompt_logprobs) == (0, 5)
    assert (request([1]).logprobs, request([1]).prompt_logprobs) == (None, None)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(EmptyPromptError, match="the prompt is empty"):
        request([])


def test_the_request_names_its_prompt() -> None:
    made = request([5, 6, 7], max_new_tokens=9)
    assert (made.uid, made.prompt_ids, made.max_new_tokens) == (7, [5, 6, 7], 9)
