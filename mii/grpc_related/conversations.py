"""Conversations as prompts: they travel as JSON with the option `chat`, and the front fills the template.

>>> prompts, options = pack_conversations([[{"role": "user", "content": "Hi"}]], {"top_p": 0.9})
>>> prompts, options
(['[{"role":"user","content":"Hi"}]'], {'top_p': 0.9, 'chat': {}})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mii.errors import RequestError

__all__ = ["CHAT", "fill_templates", "pack_conversations"]

CHAT = "chat"
"""The option that says that prompts are conversations; its value has the template's options."""

Messages = Sequence[Mapping[str, Any]]
_decode = msgspec.json.Decoder(list[dict[str, Any]]).decode


def pack_conversations(
    conversations: Sequence[Messages], options: Mapping[str, Any], **template_options: Any
) -> tuple[list[str], dict[str, Any]]:
    """Prompts and options as they travel.

    Args:
        conversations: each a list of messages with "role" and "content".
        options: generation options.
        template_options: see `mii.modeling.tokenizers.HFTokenizer.apply_chat_template`.

    Raises:
        RequestError: a message is not valid Unicode, or no JSON can be made of it.
    """
    try:
        texts = [msgspec.json.encode(messages).decode() for messages in conversations]
    except (UnicodeEncodeError, TypeError, RecursionError) as error:
        raise RequestError(f"the messages cannot be sent: {error}") from None
    return texts, {**options, CHAT: template_options}


def fill_templates(tokenizer: Any, prompts: Sequence[Any], chat: Any) -> list[list[int]]:
    """The token ids of conversations.

    Args:
        tokenizer: mii's tokenizer wrapper.
        prompts: conversations as `pack_conversations` makes them.
        chat: what the option `chat` says.

    Raises:
        RequestError: they are no conversations, there is no template, or it refuses them.
    """
    if not isinstance(chat, dict):
        raise RequestError(f"chat is {chat!r}; it must be a dict of options of the chat template, or {{}}")
    return [_fill(tokenizer, prompt, chat) for prompt in prompts]


def _fill(tokenizer: Any, prompt: Any, chat: dict[str, Any]) -> list[int]:
    try:
        messages = _decode(prompt)
    except (msgspec.MsgspecError, TypeError, RecursionError) as error:
        raise RequestError(f"with chat, a prompt is a list of messages as JSON: {error}") from None
    try:
        return list(tokenizer.apply_chat_template(messages, **{**chat, "tokenize": True}))
    except RequestError:
        raise
    except Exception as error:  # a template is a program of its own, and fails in ways of its own
        raise RequestError(f"the chat template cannot be filled: {error}") from error
