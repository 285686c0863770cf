"""Prompts and options are read, or refused with a sentence, before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mii.batching.intake import Intake
from mii.errors import EmptyPromptError, PromptEncodingError, PromptTooLongError, PromptTypeError, RequestError
from tests.batching.fake_engine import BEGIN, END, Wrapper


def intake(*, adds_begin: bool = False, seed: int | None = None, max_length: int = 100) -> Intake:
    return Intake(Wrapper(adds_begin), max_length=max_length, vocab_size=258, stop_ids=(END, 7), seed=seed)


def ids_of(prompts: Any) -> list[list[int]]:
    return [each.request.prompt_ids for each in intake().read(prompts, {})]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        (("ab", "c"), [[97, 98], [99]]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [3, 4]], [[97], [3, 4]]),
        (np.array([1, 2]), [[1, 2]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([np.array([1, 2]), np.array([3])], [[1, 2], [3]]),
        ([np.int64(1), np.int32(2)], [[1, 2]]),
        (np.array(["ab", "c"]), [[97, 98], [99]]),
        (iter(["ab", "c"]), [[97, 98], [99]]),
        ([], []),
    ],
)
def test_prompts_come_in_many_forms(prompts: Any, expected: list[list[int]]) -> None:
    read = ids_of(prompts)
    assert read == expected
    assert all(type(token) is int for ids in read for token in ids)


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        (None, PromptTypeError, "NoneType None.*list of strings"),
        (b"bytes", PromptTypeError, "bytes"),
        ({"prompt": "a"}, PromptTypeError, "dict"),
        (7, PromptTypeError, "int 7"),
        (["a", None], PromptTypeError, "prompt 1 of 2.*NoneType"),
        (["a", b"b"], PromptTypeError, "holds bytes"),
        ([1, "a"], PromptTypeError, "holds int 1"),
        ([1.5, 2.0], PromptTypeError, "holds float 1.5"),
        ([[1, 2.5]], PromptTypeError, "token ids hold float 2.5"),
        ([[1, True]], PromptTypeError, "bool True"),
        ([1, 258], RequestError, "token id 258.*0 to 257"),
        ([-1], RequestError, "token id -1"),
        ("", EmptyPromptError, "empty"),
        ([[]], EmptyPromptError, "empty"),
        (["a", ""], EmptyPromptError, "prompt 1 of 2"),
        ("a\ud800", PromptEncodingError, "character 1"),
        ("a" * 100, PromptTooLongError, "100 tokens"),
        (["a", "b" * 200, "c"], PromptTooLongError, "prompt 1 of 3.*200 tokens"),
    ],
)
def test_a_wrong_prompt_is_refused_with_the_reason(prompts: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        intake().read(prompts, {})


def test_an_empty_prompt_is_its_beginning_of_text_token_where_there_is_one() -> None:
    assert intake(adds_begin=True).read("", {})[0].request.prompt_ids == [BEGIN]


@pytest.mark.parametrize("options", [{"max_token": 5}, {"temperature": -1}, {"top_p": 2}, {"stop": [1]}, {"stop": ""}])
def test_wrong_options_are_validation_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        intake().read("a", options)


def test_options_reach_the_engine() -> None:
    options = {"max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.5, "top_k": 4, "top_p": 0.7, "min_p": 0.1}
    request = intake().read("abc", {**options, "prompt_length": 77})[0].request
    assert (request.max_new_tokens, request.min_new_tokens, request.stop_ids) == (9, 2, (END, 7))
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 4, 0.7, 0.1)


def test_ignore_eos_leaves_the_stop_strings() -> None:
    read = intake().read("abc", {"ignore_eos": True, "stop": "x"})[0]
    assert (read.request.stop_ids, read.stops.strings) == ((), ("x",))


def test_the_tokenizers_end_of_text_id_counts_as_it_is_at_the_call() -> None:
    wrapper = Wrapper()
    reader = Intake(wrapper, max_length=100, vocab_size=258, stop_ids=(7,))
    wrapper.eos_token_id = 33
    assert reader.read("a", {})[0].request.stop_ids == (7, 33)


def seeds(reader: Intake, count: int, **options: Any) -> list[int]:
    return [each.request.sampling.seed for each in reader.read(["a"] * count, options)]


def test_a_seed_fixes_each_prompts_randomness_by_its_place() -> None:
    first = seeds(intake(), 4, seed=5)
    assert len(set(first)) == 4
    assert seeds(intake(), 2, seed=5) == first[:2]
    assert seeds(intake(), 4, seed=6) != first
    assert all(0 <= seed < 2**63 for seed in first)


def test_the_models_seed_repeats_a_run_and_not_a_call() -> None:
    one, two = intake(seed=1), intake(seed=1)
    first = [seeds(one, 2), seeds(one, 2)]
    assert first == [seeds(two, 2), seeds(two, 2)]
    assert first[0] != first[1]


def test_without_a_seed_every_call_is_new() -> None:
    assert len({*seeds(intake(), 2), *seeds(intake(), 2)}) == 4


def test_full_text_is_the_prompt_as_it_was_given() -> None:
    reader = intake(adds_begin=True)
    texts = [each.text for each in reader.read(["a<s>", [BEGIN, 98], [98]], {"return_full_text": True})]
    assert texts == ["a<s>", "b", "b"]
