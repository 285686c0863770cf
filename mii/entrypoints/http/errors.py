"""Errors as HTTP answers. One body serves every kind of client: `object`, `message` and `code` (a number) are what
DeepSpeed-MII's servers sent; `error`, with `message`, `type`, `param` and `code` (a word), is what the `openai` package
reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mii.errors import (
    AccessError,
    MIIError,
    PromptTooLongError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
    ServerBusyError,
    ServerUnavailableError,
    UnsupportedFeatureError,
)
from mii.logging import logger

__all__ = [
    "CLIENT_GONE",
    "ApiError",
    "api_error",
    "bad_request",
    "no_permission",
    "on_api_error",
    "on_http_exception",
    "on_surprise",
    "unknown_model",
    "wrong_key",
]

CLIENT_GONE = 499
"""Status, in the metrics only, of a request whose client hung up."""

_VALIDATION, _NO_KEY, _NO_PERMISSION, _NO_MODEL, _TOO_LONG = 40001, 40101, 40103, 40301, 40303
_BUSY, _INTERNAL = 42903, 50001
_TYPES = {400: "invalid_request_error", 401: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a caller is told.

    Args:
        status: of HTTP.
        message: a sentence.
        kind: OpenAI's `type`; None: made from the status.
        param: the field of the request that is wrong.
        code: OpenAI's `code`, a word.
        number: DeepSpeed-MII's `code`.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        number: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.number = number or (_VALIDATION if status in (400, 422) else status * 100 + 1)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        inner = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        body = {"object": "error", "message": self.message, "code": self.number, "error": inner}
        if self.status == 401:  # where FastAPI, and so DeepSpeed-MII, has it
            body["detail"] = {"error": inner}
        return body

    def response(self) -> Response:
        """The answer."""
        return Response(msgspec.json.encode(self.body()), self.status, self.headers, "application/json")

    def event(self) -> bytes:
        """The last event of a stream that has begun and cannot go on; the `openai` package raises at it."""
        return b"data: " + msgspec.json.encode(self.body()) + b"\n\n"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the caller can put it right."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(given: str | None, served: str) -> ApiError:
    """400, as DeepSpeed-MII has it, with the code that OpenAI's 404 has."""
    wrong = f"the model {given!r} is not served here" if given else "model is required"
    return ApiError(400, f"{wrong}; use {served!r}", param="model", code="model_not_found", number=_NO_MODEL)


def wrong_key(given: bool) -> ApiError:
    """401."""
    message = "the API key is wrong" if given else "an API key is wanted, as 'Authorization: Bearer KEY'"
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", number=_NO_KEY, headers=headers)


def no_permission(message: str) -> ApiError:
    """403."""
    return ApiError(403, message, kind="permission_error", code="permission_denied", number=_NO_PERMISSION)


def api_error(error: MIIError) -> ApiError:
    """What an error of the deployment means for the HTTP caller."""
    message = str(error)
    if isinstance(error, PromptTooLongError):
        return ApiError(400, message, param="prompt", code="context_length_exceeded", number=_TOO_LONG)
    if isinstance(error, RequestError):
        return bad_request(message)
    if isinstance(error, ServerBusyError):
        seconds = str(max(1, math.ceil(error.retry_after or 0)))
        return ApiError(429, message, code="rate_limit_exceeded", number=_BUSY, headers={"Retry-After": seconds})
    if isinstance(error, (ServerUnavailableError, RequestCancelledError)):
        return ApiError(503, message, code="unavailable", headers={"Retry-After": "1"})
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, message, code="timeout")
    if isinstance(error, AccessError):
        return no_permission(message)
    if isinstance(error, UnsupportedFeatureError):
        return bad_request(message, code="unsupported")
    logger.error("a request failed: %s", message)
    return ApiError(500, message, code="internal_error", number=_INTERNAL)


async def on_api_error(request: Request, error: Exception) -> Response:
    """Handler of `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handler of what the framework refuses: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    reason = {
        404: f"there is nothing at {request.url.path}; look at /docs",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, reason, code=_word(error.status_code), headers=error.headers).response()


async def on_surprise(request: Request, error: Exception) -> Response:
    """Handler of everything else: our own mistake. The server's log gets the trace."""
    message = f"the server made a mistake ({type(error).__name__}); its log says more"
    return ApiError(500, message, code="internal_error", number=_INTERNAL).response()


def _word(status: int) -> str | None:
    return {404: "not_found", 405: "method_not_allowed"}.get(status)
