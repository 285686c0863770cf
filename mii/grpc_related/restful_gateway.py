"""The HTTP gateway of a deployment: MII's own route, the OpenAI routes, health, metrics, and the end of it all.

POST /mii/<deployment name>     {"prompts": ..., "max_new_tokens": ...}; with "stream": true as server-sent events
POST /v1/...                    what the `openai` package asks for
GET /healthz, /health           200 where an engine answers, 503 where none does; for readiness
GET /livez                      200 where this process answers; for liveness
GET /metrics                    for Prometheus
POST /terminate                 ends the deployment; with its token as "Authorization: Bearer TOKEN"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI
from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from mii.constants import RESTFUL_API_PATH
from mii.entrypoints.http.app import build_app, request_id
from mii.entrypoints.http.backend import Call, Piece, error_of_answer
from mii.entrypoints.http.bodies import ApiModel, body_schema
from mii.entrypoints.http.errors import ApiError
from mii.entrypoints.http.health import add_health
from mii.entrypoints.http.metrics import Counts
from mii.entrypoints.http.metrics_page import add_metrics
from mii.entrypoints.http.service import HttpService, json_response
from mii.entrypoints.http.settings import HttpSettings
from mii.entrypoints.openai.routes import BODIES, openai_router

__all__ = ["GenerateRequest", "create_app"]

_ROUTE = f"/{RESTFUL_API_PATH}"
_encode = msgspec.json.Encoder().encode
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}},
    ]
}


def _prompts(value: Any) -> list[str | list[int]]:
    given = [value] if isinstance(value, str) else value
    if isinstance(given, list) and given and all(type(item) is int for item in given):
        given = [given]
    if not isinstance(given, list) or not all(map(_is_prompt, given)):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    return given


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value))


class GenerateRequest(ApiModel):
    """Body of ``POST /mii/<name>``: prompts, and the options of `mii.config.GenerateParamsConfig`."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    prompts: Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)] = Field(
        description="a text or token ids, or a list of such"
    )
    stream: bool = Field(default=False, description="send the answers as they are made, as server-sent events")

    def options(self) -> dict[str, Any]:
        """Everything else. The deployment checks it."""
        return dict(self.model_extra or {})


class _Frames:
    """One event for each piece of the answers: a list of responses, as `streaming_fn` gets them."""

    def opening(self) -> bytes:
        return b""

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        if not pieces:
            return b""
        return b"data: " + _encode([{**_response(piece), "index": piece.index} for piece in pieces]) + b"\n\n"

    def closing(self, counts: Counts) -> bytes:
        return b""


def create_app(settings: HttpSettings) -> FastAPI:
    """The gateway.

    Args:
        settings: where the deployment is, and who may use it.
    """
    app, service = build_app(settings, "mii", (GenerateRequest, *BODIES))
    add_health(app, service)
    add_metrics(app, service)
    app.include_router(openai_router(service))

    @app.post(
        f"{_ROUTE}/{{name:path}}",
        openapi_extra=body_schema(GenerateRequest),
        dependencies=[Depends(settings.api_keys.check)],
    )
    async def generate(name: str, request: Request) -> Response:
        return await _generate(service, name, request)

    @app.post("/terminate")
    async def terminate(request: Request) -> Response:
        await service.backend.terminate(_token(request))
        return PlainTextResponse("the deployment is ending")

    return app


async def _generate(service: HttpService, name: str, request: Request) -> Response:
    if name != service.settings.deployment:
        served = service.settings.deployment
        raise ApiError(404, f"there is no deployment {name!r} here; there is {served!r}", code="not_found")
    body = await service.read(request, GenerateRequest)
    call = Call(body.prompts, body.options(), request_id(request.scope))
    if body.stream:
        return await service.stream(request, call, _ROUTE, _Frames())
    answers = await service.generate(request, call, _ROUTE)
    wrong = next((answer for answer in answers if answer.error), None)
    if wrong is not None:
        raise error_of_answer(wrong)
    return json_response([_response(answer) for answer in answers])


def _response(piece: Piece) -> dict[str, Any]:
    """An answer, or a piece of one, as `mii.batching.data_classes.Response.to_msg_dict` has it."""
    response: dict[str, Any] = {
        "generated_text": piece.response,
        "prompt_length": piece.prompt_tokens,
        "generated_length": piece.generated_tokens,
        "finish_reason": piece.finish_reason or "none",
    }
    if piece.error:
        response["error"] = piece.error
    if piece.logprobs:
        response["logprobs"] = [_logprob(token) for token in piece.logprobs]
    if piece.prompt_logprobs:
        response["prompt_logprobs"] = [_logprob(token) for token in piece.prompt_logprobs]
    return response


def _logprob(token: Any) -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "token": token.token.decode(errors="replace"),
        "bytes": list(token.token),
        "logprob": token.logprob if token.HasField("logprob") else None,
        "top": [_logprob(each) for each in token.top],
    }


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    raise ApiError(
        401,
        "the deployment's token is wanted, as 'Authorization: Bearer TOKEN'; it is in the file 'token' of its folder",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
