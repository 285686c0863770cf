"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mii.entrypoints.http.app import request_id
from mii.entrypoints.http.backend import Call, Piece, error_of_answer
from mii.entrypoints.http.errors import unknown_model
from mii.entrypoints.http.metrics import Counts
from mii.entrypoints.http.service import HttpService, json_response
from mii.entrypoints.http.streaming import DONE
from mii.entrypoints.openai.frames import FINGERPRINT, CompletionFrames, new_id, usage
from mii.entrypoints.openai.logprobs import completion_logprobs
from mii.entrypoints.openai.protocol import CompletionRequest

__all__ = ["create_completion", "prompts_of"]

_ROUTE = "/v1/completions"


async def create_completion(service: HttpService, request: Request) -> Response:
    """Goes on with each prompt.

    Raises:
        ApiError: the request is wrong, or the deployment cannot answer it.
        ClientGoneError: the client has hung up.
    """
    body = await service.read(request, CompletionRequest)
    if not service.settings.is_served(body.model):
        raise unknown_model(body.model, service.settings.model)
    prompts = [prompt for prompt in prompts_of(body) for _ in range(body.choices)]
    call = Call(prompts, body.options(), request_id(request.scope))
    texts = [prompt for prompt in prompts if isinstance(prompt, str)] if body.echo else []
    frames = CompletionFrames(str(body.model), body.choices, body.include_usage, texts)
    if body.stream and (not body.echo or (len(texts) == len(prompts) and body.logprobs is None)):
        return await service.stream(request, call, _ROUTE, frames)
    answers = await service.generate(request, _with_prompts(body, call), _ROUTE)
    counts = Counts(answers)
    completion = _completion(body, answers, counts)
    return _at_once(completion, frames, body, counts) if body.stream else json_response(completion)


def prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request as a list."""
    prompt: Any = body.prompt
    alone = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if alone else prompt


def _with_prompts(body: CompletionRequest, call: Call) -> Call:
    """The same, with the prompts' text before the answers."""
    return replace(call, options={**call.options, "return_full_text": True}) if body.echo else call


def _at_once(completion: dict[str, Any], frames: CompletionFrames, body: CompletionRequest, counts: Counts) -> Response:
    """A stream of what is all there: what is said of a prompt comes late, and before the answer."""
    events = b"".join(map(frames.choice, completion["choices"])) + frames.closing(counts, not body.scores_only)
    return Response(events + DONE, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _completion(body: CompletionRequest, answers: Sequence[Piece], counts: Counts) -> dict[str, Any]:
    choices = []
    for answer in answers:
        if answer.error:
            raise error_of_answer(answer)
        choices.append(_choice(body, answer))
    return {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": FINGERPRINT,
        "choices": choices,
        "usage": usage(counts, body.choices, not body.scores_only),
    }


def _choice(body: CompletionRequest, answer: Piece) -> dict[str, Any]:
    tokens = [*answer.prompt_logprobs, *(() if body.scores_only else answer.logprobs)]
    return {
        "index": answer.index,
        "text": _prompt_text(body, answer) if body.scores_only else answer.response,
        "logprobs": completion_logprobs(tokens)[0] if body.logprobs is not None else None,
        "finish_reason": "length" if body.scores_only else answer.finish_reason,
    }


def _prompt_text(body: CompletionRequest, answer: Piece) -> str:
    """The prompt as it came or, of token ids, their text."""
    prompt = prompts_of(body)[answer.index // body.choices]
    if isinstance(prompt, str):
        return prompt
    return b"".join(token.token for token in answer.prompt_logprobs).decode(errors="replace")
