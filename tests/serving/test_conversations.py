"""Conversations as prompts, from the messages to the token ids."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from google.protobuf.message import Message

from mii.errors import RequestError
from mii.grpc_related import conversations
from mii.grpc_related.conversations import CHAT, fill_templates, pack_conversations
from mii.grpc_related.convert import pack_request, prompts_of, unpack_options
from mii.modeling.tokenizers import HFTokenizer
from tests.checkpoints import byte_tokenizer

MESSAGES = [{"role": "system", "content": "Ünïcode"}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return HFTokenizer(byte_tokenizer())


def fill(tokenizer: Any, *prompts: Any, **chat: Any) -> list[list[int]]:
    return fill_templates(tokenizer, prompts, chat)


def test_the_example_holds() -> None:
    assert doctest.testmod(conversations).failed == 0


def test_messages_travel_and_become_what_the_template_makes_of_them(tokenizer: HFTokenizer) -> None:
    prompts, options = pack_conversations([MESSAGES, MESSAGES[1:]], {"top_p": 0.5}, add_generation_prompt=True)
    request: Message = pack_request(prompts, options)
    unpacked = unpack_options(request)
    assert unpacked == {"top_p": 0.5, CHAT: {"add_generation_prompt": True}}
    filled = fill_templates(tokenizer, prompts_of(request), unpacked[CHAT])
    assert filled == [tokenizer.apply_chat_template(messages) for messages in (MESSAGES, MESSAGES[1:])]


def test_the_templates_options_count(tokenizer: HFTokenizer) -> None:
    (prompt,), _ = pack_conversations([MESSAGES], {})
    (own,) = fill(tokenizer, prompt, chat_template="{{ messages[1].content }}{{ name }}", name="!")
    assert tokenizer.decode(own) == "Hi!"
    assert fill(tokenizer, prompt, add_generation_prompt=False) == [
        tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    (named,) = fill(tokenizer, prompt, chat_template="{{ tools[0].function.name }}", tools=tools)
    assert tokenizer.decode(named) == "f"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("hello", "a prompt is a list of messages as JSON"),
        ('{"role": "user"}', "a prompt is a list of messages as JSON"),
        ("[1]", "a prompt is a list of messages as JSON"),
        ([1, 2], "a prompt is a list of messages as JSON"),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer: HFTokenizer, prompt: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        fill(tokenizer, prompt)


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ x.y.z }}"])
def test_a_template_that_fails_is_the_callers_error(tokenizer: HFTokenizer, template: str) -> None:
    (prompt,), _ = pack_conversations([MESSAGES], {})
    with pytest.raises(RequestError, match="template"):
        fill(tokenizer, prompt, chat_template=template)


def test_a_model_without_a_template_says_so() -> None:
    plain = byte_tokenizer()
    plain.chat_template = None
    (prompt,), _ = pack_conversations([MESSAGES], {})
    with pytest.raises(RequestError, match="This model has no chat template"):
        fill(HFTokenizer(plain), prompt)


def test_the_option_must_be_a_dict(tokenizer: HFTokenizer) -> None:
    with pytest.raises(RequestError, match="chat is True; it must be a dict"):
        fill_templates(tokenizer, ["[]"], True)


def test_messages_that_are_no_unicode_do_not_travel() -> None:
    with pytest.raises(RequestError, match="the messages cannot be sent"):
        pack_conversations([[{"role": "user", "content": "\ud800"}]], {})
