"""A plain HTTP server over a deployment: ``POST /generate``.

    python -m mii.entrypoints.api_server --model path-or-id
    curl -d '{"prompt": "DeepSpeed is"}' -H 'Content-Type: application/json' http://localhost:8000/generate

The body is that of an OpenAI completion, of which ``model`` is not used; the answer is ``{"text": [...]}``. With
``"stream": true`` the texts come in pieces, each ``{"text": [piece]}`` and, where there are several, ``"index"``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from mii.entrypoints.http.app import build_app, request_id
from mii.entrypoints.http.backend import Call, Piece, error_of_answer
from mii.entrypoints.http.bodies import InvalidBodyError, body_schema
from mii.entrypoints.http.health import add_health
from mii.entrypoints.http.metrics import Counts
from mii.entrypoints.http.metrics_page import add_metrics
from mii.entrypoints.http.service import HttpService, json_response
from mii.entrypoints.http.settings import HttpSettings
from mii.entrypoints.openai.completions import prompts_of
from mii.entrypoints.openai.protocol import CompletionRequest
from mii.entrypoints.options import parser
from mii.entrypoints.run import serve_app

__all__ = ["create_app", "main"]

_ROUTE = "/generate"
_encode = msgspec.json.Encoder().encode


class _Frames:
    """Events of a stream.

    Args:
        echo: what comes before each text.
        several: whether pieces say whose they are.
    """

    def __init__(self, echo: Sequence[str], several: bool) -> None:
        self._echo, self._several = echo, several

    def opening(self) -> bytes:
        return b"".join(self._event(index, text) for index, text in enumerate(self._echo))

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        wrong = next((piece for piece in pieces if piece.error), None)
        if wrong is not None:
            raise error_of_answer(wrong)
        return b"".join(self._event(piece.index, piece.response) for piece in pieces if piece.response)

    def closing(self, counts: Counts) -> bytes:
        return b""

    def _event(self, index: int, text: str) -> bytes:
        event: dict[str, Any] = {"text": [text], "index": index} if self._several else {"text": [text]}
        return b"data: " + _encode(event) + b"\n\n"


def create_app(settings: HttpSettings) -> FastAPI:
    """The route, health and metrics.

    Args:
        settings: where the deployment is.
    """
    app, service = build_app(settings, "mii", (CompletionRequest,))
    add_health(app, service)
    add_metrics(app, service)

    @app.post(_ROUTE, openapi_extra=body_schema(CompletionRequest))
    async def generate(request: Request) -> Response:
        return await _generate(service, request)

    return app


async def _generate(service: HttpService, request: Request) -> Response:
    try:
        body = await service.read(request, CompletionRequest)
    except InvalidBodyError as error:
        error.status = 422  # what DeepSpeed-MII's server has here
        raise
    prompts = [prompt for prompt in prompts_of(body) for _ in range(body.choices)]
    call = Call(prompts, {**body.options(), "return_full_text": bool(body.echo)}, request_id(request.scope))
    if body.stream:
        echo = [prompt for prompt in prompts if isinstance(prompt, str)] if body.echo else []
        return await service.stream(request, call, _ROUTE, _Frames(echo, len(prompts) > 1))
    answers = await service.generate(request, call, _ROUTE)
    wrong = next((answer for answer in answers if answer.error), None)
    if wrong is not None:
        raise error_of_answer(wrong)
    return json_response({"text": [answer.response for answer in answers]})


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; see the module. Returns the exit code."""
    program = "python -m mii.entrypoints.api_server"
    options = parser(program, "Serves POST /generate.", os.environ, openai=False)
    return serve_app(options, options.parse_args(arguments), create_app)


if __name__ == "__main__":
    sys.exit(main())
