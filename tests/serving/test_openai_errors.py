"""What the OpenAI routes refuse, what goes wrong behind them, and who may ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from mii.entrypoints.http.settings import ApiKeys
from mii.entrypoints.openai_api_server import create_app
from tests.serving.fake_backend import HttpFixture, answer_of, serving
from tests.serving.openai_calls import MESSAGES, asking, openai_server


@pytest.fixture(scope="module")
def server() -> Iterator[HttpFixture]:
    with openai_server() as fixture:
        yield fixture


@pytest.fixture(scope="module")
def client(server: HttpFixture) -> Iterator[openai.OpenAI]:
    with asking(server) as made:
        yield made


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
