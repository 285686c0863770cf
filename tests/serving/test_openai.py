"""The OpenAI routes for models and completions, asked by the `openai` package's own client over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion

from mii.grpc_related.conversations import CHAT
from tests.serving.fake_backend import LONGEST, HttpFixture, answer_of
from tests.serving.openai_calls import KEYS, MESSAGES, asking, openai_server, raw_events


@pytest.fixture(scope="module")
def server() -> Iterator[HttpFixture]:
    with openai_server() as fixture:
        yield fixture


@pytest.fixture(scope="module")
def client(server: HttpFixture) -> Iterator[openai.OpenAI]:
    with asking(server) as made:
        yield made


# Models


def test_models_are_listed_and_found_by_any_of_their_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "demo"]
    card = client.models.retrieve("demo")
    assert (card.id, card.object, card.owned_by) == ("demo", "model", "deepspeed-mii")
    assert card.model_dump()["root"] == "tiny" and card.created > 1_700_000_000
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; 'tiny' is here"):
        client.models.retrieve("other")


# Completions


def test_a_completion_has_text_and_real_counts(client: openai.OpenAI, server: HttpFixture) -> None:
    completion = client.completions.create(model="tiny", prompt="DeepSpeed is", max_tokens=4)
    assert isinstance(completion, Completion) and completion.id.startswith("cmpl-")
    (choice,) = completion.choices
    assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == (answer_of(4), 0, "length", None)
    assert completion.usage is not None and completion.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
    }
    assert completion.model == "tiny" and completion.object == "text_completion"
    assert server.fake.calls[-1][0] == ["DeepSpeed is"]


def test_defaults_are_those_of_deepspeed_mii_and_special_tokens_are_dropped(
    client: openai.OpenAI, server: HttpFixture
) -> None:
    client.completions.create(model="tiny", prompt="x")
    expected = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 128, "skip_special_tokens": True}
    assert server.options == expected
    client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert server.options == {**expected, CHAT: {"add_generation_prompt": True}}


def test_what_openai_refuses_and_this_takes(client: openai.OpenAI, server: HttpFixture) -> None:
    no_functions: Any = []
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=9, max_tokens=99_999, functions=no_functions
    )
    assert (server.options["temperature"], server.options["max_new_tokens"]) == (9.0, 99_999)
    assert chat.choices[0].finish_reason == "length" and chat.usage is not None
    assert chat.usage.completion_tokens == LONGEST


def test_every_option_reaches_the_deployment_under_its_own_name(client: openai.OpenAI, server: HttpFixture) -> None:
    client.completions.create(
        model="tiny",
        prompt="x",
        max_tokens=9,
        temperature=0,
        top_p=0.5,
        seed=-1,
        stop=["a", "bb"],
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        logit_bias={"7": -100, "8": 3},
        logprobs=2,
        user="me",
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "repetition_penalty": 1.1,
            "skip_special_tokens": False,
            "stop_token_ids": [4],
            "allowed_token_ids": [1, 2],
            "max_length": 77,
        },
    )
    assert server.options == {
        "max_new_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 2**63 - 1,
        "stop": ["a", "bb"],
        "presence_penalty": 1.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"7": -100.0, "8": 3.0},
        "logprobs": 2,
        "top_k": 5,
        "min_p": 0.1,
        "min_new_tokens": 2,
        "ignore_eos": True,
        "repetition_penalty": 1.1,
        "skip_special_tokens": False,
        "stop_token_ids": [4],
        "allowed_token_ids": [1, 2],
        "max_length": 77,
    }


def test_what_asks_for_nothing_is_not_sent(client: openai.OpenAI, server: HttpFixture) -> None:
    client.completions.create(
        model="tiny",
        prompt="x",
        stop=None,
        presence_penalty=0,
        logit_bias={},
        suffix="",
        best_of=1,
        user="u",
        extra_body={
            "top_k": -1,
            "min_p": 0,
            "repetition_penalty": 1.0,
            "use_beam_search": False,
            "max_tokens": None,
            "store": False,
            "response_format": {"type": "text"},
            "metadata": {"trace": "1"},
            "guided_json": None,
        },
    )
    assert set(server.options) == {"temperature", "top_p", "max_new_tokens", "skip_special_tokens"}
    client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        metadata={"trace": "1"},
        store=False,
        parallel_tool_calls=True,
        response_format={"type": "text"},
        stream_options=None,
        extra_body={"suffix": None, "prompt_cache_retention": None},
    )
    assert set(server.options) == {"temperature", "top_p", "max_new_tokens", "skip_special_tokens", CHAT}


def test_max_completion_tokens_counts_before_max_tokens(client: openai.OpenAI, server: HttpFixture) -> None:
    client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, max_completion_tokens=2)
    assert server.options["max_new_tokens"] == 2


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        (["a b", "c"], ["a b", "c"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts_may_be_several_and_token_ids(
    client: openai.OpenAI, server: HttpFixture, prompt: Any, sent: Any
) -> None:
    completion = client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert server.fake.calls[-1][0] == sent
    assert [choice.index for choice in completion.choices] == list(range(len(sent)))
    assert completion.usage is not None and completion.usage.prompt_tokens == 3


def test_n_answers_to_each_prompt_count_its_tokens_once(client: openai.OpenAI, server: HttpFixture) -> None:
    completion = client.completions.create(model="tiny", prompt=["a b", "c"], n=3, max_tokens=2, seed=5)
    assert server.fake.calls[-1][0] == ["a b"] * 3 + ["c"] * 3
    assert [choice.index for choice in completion.choices] == list(range(6))
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 12)


def test_a_completion_streams_its_text_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=5, stream=True))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
    assert texts == {0: answer_of(5), 1: answer_of(5)}
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == ["length", "length"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1


def test_every_event_of_a_completion_has_every_field(server: HttpFixture) -> None:
    events = raw_events(server, "completions", prompt="a", max_tokens=2)
    assert len(events) == 3
    for event in events:
        assert set(event) == KEYS and event["object"] == "text_completion"
        assert set(event["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}


def test_usage_is_a_last_event_without_choices(client: openai.OpenAI, server: HttpFixture) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(model="tiny", prompt="a b", n=2, max_tokens=3, **options)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (2, 6, 8)
    events = raw_events(server, "completions", prompt="a", stream_options={"include_usage": True})
    assert all(set(event) == KEYS | {"usage"} for event in events)


def test_completion_logprobs_have_tokens_and_offsets(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt="x", max_tokens=3, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["one", " two", " thrée"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs == [{"t0": -1.0, "t1": -2.0}] * 3
    assert logprobs.text_offset == [0, 3, 7]
    streamed = client.completions.create(model="tiny", prompt="x", max_tokens=3, logprobs=0, stream=True)
    offsets = [chunk.choices[0].logprobs.text_offset for chunk in streamed if chunk.choices[0].logprobs]
    assert offsets == [[0], [3], [7]]


def test_echo_puts_the_prompt_first(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=["a b", "c"], max_tokens=2, echo=True)
    assert [choice.text for choice in whole.choices] == ["a b" + answer_of(2), "c" + answer_of(2)]
    ids = client.completions.create(model="tiny", prompt=[5, 6], max_tokens=1, echo=True)
    assert ids.choices[0].text == "<5><6>one"


@pytest.mark.parametrize(("prompt", "text"), [("a b", "a b"), ([5, 6], "<5><6>")])
def test_echo_streams_the_prompt_first(client: openai.OpenAI, prompt: Any, text: str) -> None:
    chunks = list(client.completions.create(model="tiny", prompt=prompt, max_tokens=2, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text + answer_of(2)
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_an_answer(client: openai.OpenAI, server: HttpFixture, stream: bool) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    given = {"prompt": "a b c", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer: Any = client.completions.create(model="tiny", **given, **options)
    completions = list(answer) if stream else [answer]
    (choice,) = completions[0].choices
    assert (choice.text, choice.finish_reason) == ("a b c", "length")
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    assert choice.logprobs.top_logprobs == [None, {"t0": -1.0}, {"t0": -1.0}]
    assert completions[-1].usage.completion_tokens == 0
    assert (server.options["max_new_tokens"], server.options["prompt_logprobs"]) == (1, 1)
    ids = client.completions.create(model="tiny", prompt=[7, 8], max_tokens=0, echo=True)
    assert ids.choices[0].text == "<7><8>"
