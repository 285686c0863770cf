"""The OpenAI routes, asked by the `openai` package's own client over a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mii.entrypoints.http.settings import ApiKeys
from mii.entrypoints.openai_api_server import create_app
from mii.grpc_related.conversations import CHAT
from tests.serving.fake_backend import LONGEST, HttpFixture, answer_of, serving

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello to me"}]
KEYS = {"id", "object", "created", "model", "system_fingerprint", "choices"}


@pytest.fixture(scope="module")
def server() -> Iterator[HttpFixture]:
    with serving(create_app, aliases=("demo",), response_role="helper") as fixture:
        yield fixture


@pytest.fixture(scope="module")
def client(server: HttpFixture) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def raw_events(server: HttpFixture, route: str, **body: Any) -> list[Any]:
    """The events of a stream as JSON; the last line must be [DONE]."""
    response = server.http.post(f"/v1/{route}", json={"model": "tiny", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


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
        extra_body={"top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "use_beam_search": False, "max_tokens": None},
    )
    assert set(server.options) == {"temperature", "top_p", "max_new_tokens", "skip_special_tokens"}


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


# Chats


def test_a_chat_is_answered_and_its_messages_travel_as_they_are(client: openai.OpenAI, server: HttpFixture) -> None:
    completion = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=2, n=2)
    assert isinstance(completion, ChatCompletion) and completion.id.startswith("chatcmpl-")
    assert [choice.message.content for choice in completion.choices] == [answer_of(2)] * 2
    assert completion.choices[0].message.role == "helper" and completion.model == "demo"
    prompts, options, _ = server.fake.calls[-1]
    assert [json.loads(prompt) for prompt in prompts] == [MESSAGES, MESSAGES]
    assert options[CHAT] == {"add_generation_prompt": True}
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (8, 4)


def test_a_chat_streams_role_then_content_then_reason(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3, stream=True))
    assert all(isinstance(chunk, ChatCompletionChunk) and chunk.object == "chat.completion.chunk" for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("helper", "")
    assert "".join(delta.content or "" for delta in deltas) == answer_of(3)
    assert deltas[-1].content is None
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["length"]


def test_every_event_of_a_chat_has_every_field(server: HttpFixture) -> None:
    events = raw_events(server, "chat/completions", messages=MESSAGES, max_tokens=2, n=2)
    assert len(events) == 2 + 4 + 2
    for event in events:
        assert set(event) == KEYS and event["object"] == "chat.completion.chunk"
        assert set(event["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}
    assert [event["choices"][0]["index"] for event in events[:2]] == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_have_tokens_bytes_and_alternatives(client: openai.OpenAI, stream: bool) -> None:
    answer: Any = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=1, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    content = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in content] == ["one", " two", " thrée"]
    assert content[2].bytes == list(" thrée".encode()) and content[2].logprob == -0.5
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("t0", -1.0)]


def test_parts_of_text_are_joined_and_other_fields_reach_the_template(
    client: openai.OpenAI, server: HttpFixture
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    given: Any = {"tools": [tool], "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    client.chat.completions.create(model="tiny", messages=messages, **given)
    prompts, options, _ = server.fake.calls[-1]
    assert json.loads(prompts[0]) == [{"role": "user", "content": "a\nb"}, *messages[1:]]
    assert options[CHAT] == {"enable_thinking": False, "add_generation_prompt": True, "tools": [tool]}
    client.chat.completions.create(model="tiny", messages=MESSAGES, tool_choice="none", **given)
    assert "tools" not in server.options[CHAT]


def test_without_an_opening_the_role_is_the_assistants(client: openai.OpenAI, server: HttpFixture) -> None:
    completion = client.chat.completions.create(
        model="tiny", messages=MESSAGES, extra_body={"add_generation_prompt": False}
    )
    assert completion.choices[0].message.role == "assistant"
    assert server.options[CHAT] == {"add_generation_prompt": False}


def test_a_template_of_the_servers_own_goes_along() -> None:
    with serving(create_app, chat_template="{{ messages }}") as server:
        body = {"model": "tiny", "messages": MESSAGES}
        assert server.http.post("/v1/chat/completions", json=body).status_code == 200
        assert server.options[CHAT] == {"add_generation_prompt": True, "chat_template": "{{ messages }}"}


# What is refused


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "there is no field 'temprature'; did you mean 'temperature'?"),
        ({"best_of": 4}, "best_of", "best_of=4 is not supported here; leave 'best_of' out"),
        ({"suffix": "end"}, "suffix", "suffix='end' is not supported here"),
        ({"n": 0}, "n", "n=0 must be greater than or equal to 1"),
        ({"n": "2"}, "n", "n='2' must be a valid integer"),
        ({"temperature": -1}, "temperature", "must be greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "must be greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; an answer has at least one token"),
        ({"max_tokens": 1.5}, "max_tokens", "must be an integer of at least 0"),
        ({"prompt": []}, "prompt", "must be a string, a list of strings"),
        ({"prompt": ["a", 1]}, "prompt", "mixes kinds of prompts"),
        ({"prompt": {"a": 1}}, "prompt", "must be a string"),
        ({"stop": ["a", ""]}, "stop", "an empty string would end every answer at once"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "must have token ids as names"),
        ({"logit_bias": {"1": 101}}, None, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream=true only"),
        ({"model": "other"}, "model", "the model 'other' is not served here; use 'tiny'"),
        ({"model": None}, "model", "model is required; use 'tiny'"),
        ({"prompt": "!long"}, "prompt", "the prompt has 9 tokens"),
    ],
)
def test_a_wrong_completion_is_refused_by_the_name_of_what_is_wrong(
    client: openai.OpenAI, given: dict[str, Any], param: str | None, words: str
) -> None:
    body: Any = {"model": "tiny", "prompt": "x", **given}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body=body, cast_to=object)
    assert words in caught.value.body["message"]  # type: ignore[index, call-overload]
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported here"),
        ({"tool_choice": "required"}, "tool_choice", "calls cannot be forced here"),
        ({"top_logprobs": 2}, "top_logprobs", "goes with logprobs=true only"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hello"}, "messages", "must be a list of messages"),
        ({"messages": [{"content": "x"}]}, "messages", "with 'role'"),
        ({"messages": [{"role": "user"}]}, "messages", "has no 'content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "content of type 'image_url' is not supported; only text is",
        ),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "may not have 'tokenize'"),
        ({"audio": {"voice": "x"}}, "audio", "is not supported here"),
    ],
)
def test_a_wrong_chat_is_refused_by_the_name_of_what_is_wrong(
    client: openai.OpenAI, given: dict[str, Any], param: str, words: str
) -> None:
    body: Any = {"model": "tiny", "messages": MESSAGES, **given}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert words in caught.value.body["message"]  # type: ignore[index, call-overload]
    assert caught.value.param == param


def test_errors_have_the_fields_of_both_worlds(server: HttpFixture) -> None:
    wrong = server.http.post("/v1/completions", json={"model": "tiny", "prompt": 7})
    message = wrong.json()["message"]
    assert wrong.json() == {
        "object": "error",
        "message": message,
        "code": 40001,
        "error": {"message": message, "type": "invalid_request_error", "param": "prompt", "code": None},
    }
    unknown = server.http.post("/v1/completions", json={"model": "x", "prompt": "a"})
    assert (unknown.status_code, unknown.json()["code"]) == (400, 40301)
    assert unknown.json()["error"]["code"] == "model_not_found"
    long = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "!long"})
    assert long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_failures_below_have_their_own_status(client: openai.OpenAI, stream: bool) -> None:
    def ask(prompt: str) -> None:
        client.completions.create(model="tiny", prompt=prompt, stream=stream)

    with pytest.raises(openai.RateLimitError, match="the queue is full") as busy:
        ask("!busy")
    assert busy.value.response.headers["retry-after"] == "3"
    with pytest.raises(openai.InternalServerError, match="no replica is there") as gone:
        ask("!gone")
    assert gone.value.status_code == 503 and gone.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.InternalServerError, match="the engine is wrong") as wrong:
        ask("!wrong")
    assert wrong.value.status_code == 500


def test_an_answer_that_fails_fails_the_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="the engine could not go on"):
        client.completions.create(model="tiny", prompt=["fine", "!breaks"])


@pytest.mark.parametrize(("prompt", "words"), [("!breaks", "could not go on"), ("!dies", "is lost")])
def test_a_stream_that_cannot_go_on_ends_with_an_error(client: openai.OpenAI, prompt: str, words: str) -> None:
    seen: list[str] = []
    chunks = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, stream=True)
    with pytest.raises(openai.APIError, match=words):
        seen.extend(chunk.choices[0].text for chunk in chunks)
    assert seen and answer_of(5).startswith("".join(seen))


# Callers


def test_a_client_that_goes_away_ends_its_stream(client: openai.OpenAI, server: HttpFixture) -> None:
    before = server.fake.cancelled
    stream = client.completions.create(model="tiny", prompt="!slow", stream=True)
    next(stream)
    stream.close()
    server.wait_cancelled(before + 1)


def test_keys_are_wanted_where_there_are_some() -> None:
    with serving(create_app, api_keys=ApiKeys(["key-1", "schlüssel"])) as server:
        for key in ("key-1", "schlüssel"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert server.http.get("/v1/models", headers=headers).status_code == 200
        wrong = {"", "Bearer", "Bearer key-2", "Bearer key-1 x", "Basic key-1", "key-1"}
        for value in wrong:
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions")):
                response = server.http.request(method, path, headers={"Authorization": value})
                assert response.status_code == 401, value
                assert response.json()["detail"]["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="other").models.list()
        assert server.http.get("/health").status_code == 200
        assert server.fake.calls == []
