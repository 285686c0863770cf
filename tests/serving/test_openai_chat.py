"""Chat completions, asked by the `openai` package's own client over a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mii.entrypoints.openai_api_server import create_app
from mii.grpc_related.conversations import CHAT
from tests.serving.fake_backend import HttpFixture, answer_of, serving
from tests.serving.openai_calls import KEYS, MESSAGES, asking, openai_server, raw_events


@pytest.fixture(scope="module")
def server() -> Iterator[HttpFixture]:
    with openai_server() as fixture:
        yield fixture


@pytest.fixture(scope="module")
def client(server: HttpFixture) -> Iterator[openai.OpenAI]:
    with asking(server) as made:
        yield made


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
    said = {**messages[1], "content": ""}
    assert json.loads(prompts[0]) == [{"role": "user", "content": "a\nb"}, said, messages[2]]
    assert options[CHAT] == {"enable_thinking": False, "add_generation_prompt": True, "tools": [tool]}
    client.chat.completions.create(model="tiny", messages=MESSAGES, tool_choice="none", **given)
    assert "tools" not in server.options[CHAT]


@pytest.mark.parametrize(
    ("written", "given"),
    [
        ('{"city": "Oslo"}', {"city": "Oslo"}),
        ("", {}),
        ("{broken", "{broken"),
        ("[1]", "[1]"),
        ({"city": "Oslo"}, {"city": "Oslo"}),
    ],
)
def test_templates_get_the_arguments_of_a_call_as_an_object(
    client: openai.OpenAI, server: HttpFixture, written: Any, given: Any
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": written}}
    message: Any = {"role": "assistant", "tool_calls": [call]}
    client.chat.completions.create(model="tiny", messages=[*MESSAGES, message])
    (turn,) = json.loads(server.fake.calls[-1][0][0])[len(MESSAGES) :]
    assert turn["tool_calls"] == [{**call, "function": {"name": "f", "arguments": given}}]


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
