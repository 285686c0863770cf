"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mii.entrypoints.http.app import request_id
from mii.entrypoints.http.backend import Call, Piece, error_of_answer
from mii.entrypoints.http.errors import bad_request, unknown_model
from mii.entrypoints.http.metrics import Counts
from mii.entrypoints.http.service import HttpService, json_response
from mii.entrypoints.openai.frames import FINGERPRINT, ChatFrames, new_id, usage
from mii.entrypoints.openai.logprobs import chat_logprobs
from mii.entrypoints.openai.protocol import ChatCompletionRequest
from mii.errors import RequestError
from mii.grpc_related.conversations import pack_conversations

__all__ = ["create_chat_completion"]

_ROUTE = "/v1/chat/completions"
_ASSISTANT = "assistant"


async def create_chat_completion(service: HttpService, request: Request) -> Response:
    """Answers a conversation.

    Raises:
        ApiError: the request is wrong, or the deployment cannot answer it.
        ClientGoneError: the client has hung up.
    """
    body = await service.read(request, ChatCompletionRequest)
    if not service.settings.is_served(body.model):
        raise unknown_model(body.model, service.settings.model)
    call = _call(service, request, body)
    # Without an opening the template goes on with whoever spoke last, whom DeepSpeed-MII calls the assistant.
    role = _ASSISTANT if body.add_generation_prompt is False else service.settings.response_role
    if body.stream:
        frames = ChatFrames(str(body.model), body.choices, body.include_usage, role)
        return await service.stream(request, call, _ROUTE, frames)
    answers = await service.generate(request, call, _ROUTE)
    return json_response(_completion(body, answers, role))


def _call(service: HttpService, request: Request, body: ChatCompletionRequest) -> Call:
    template_options = body.template_options()
    if service.settings.chat_template is not None:
        template_options["chat_template"] = service.settings.chat_template
    try:
        prompts, options = pack_conversations([body.messages] * body.choices, body.options(), **template_options)
    except RequestError as error:
        raise bad_request(str(error), "messages") from error
    return Call(prompts, options, request_id(request.scope))


def _completion(body: ChatCompletionRequest, answers: Sequence[Piece], role: str) -> dict[str, Any]:
    choices = []
    for answer in answers:
        if answer.error:
            raise error_of_answer(answer)
        choices.append(_choice(answer, role, bool(body.logprobs)))
    return {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": FINGERPRINT,
        "choices": choices,
        "usage": usage(Counts(answers), body.choices),
    }


def _choice(answer: Piece, role: str, logprobs: bool) -> dict[str, Any]:
    return {
        "index": answer.index,
        "message": {"role": role, "content": answer.response, "refusal": None},
        "logprobs": chat_logprobs(answer.logprobs) if logprobs else None,
        "finish_reason": answer.finish_reason,
    }
