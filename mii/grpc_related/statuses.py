"""Which gRPC status an error becomes, and which error a status."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import grpc
from pydantic import ValidationError

from mii import errors
from mii.errors import MIIError, RequestError, ServerBusyError, ServerUnavailableError
from mii.validation import explain

__all__ = ["KIND", "NO_RETRY", "RETRY_AFTER", "Status", "error_of", "status_of"]

RETRY_AFTER = "retry-after-ms"
"""Trailing metadata of RESOURCE_EXHAUSTED: milliseconds after which there may be room."""
KIND = "mii-error"
"""Trailing metadata: the class of the error, of those in `mii.errors`."""
NO_RETRY = ("grpc-retry-pushback-ms", "-1")
"""Trailing metadata of UNAVAILABLE: what could be tried again has been. gRPC's own retries heed it too."""

_LONGEST_DETAILS = 4000  # characters; details travel as a header, and headers of more than 8 KiB are refused
_CODES: list[tuple[type[Exception], grpc.StatusCode]] = [
    (ValidationError, grpc.StatusCode.INVALID_ARGUMENT),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (ServerBusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ServerUnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.RequestTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.RequestCancelledError, grpc.StatusCode.CANCELLED),
    (errors.AccessError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.UnsupportedFeatureError, grpc.StatusCode.UNIMPLEMENTED),
]
_ERRORS: dict[grpc.StatusCode, type[MIIError]] = {code: kind for kind, code in _CODES if issubclass(kind, MIIError)}

Status = tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]


class EndedCall(Protocol):
    """What gRPC raises, synchronous or not."""

    def code(self) -> Any: ...
    def details(self) -> Any: ...
    def trailing_metadata(self) -> Any: ...


def status_of(error: Exception) -> Status:
    """Code, details and trailing metadata. Errors that nobody expects are INTERNAL, with their type's name."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
    metadata = []
    if isinstance(error, MIIError):
        metadata.append((KIND, type(error).__name__))
    if isinstance(error, ServerBusyError) and error.retry_after is not None:
        metadata.append((RETRY_AFTER, str(round(error.retry_after * 1000))))
    return code, _details(error), tuple(metadata)


def error_of(call: EndedCall, message: str | None = None) -> MIIError:
    """What `mii.errors` has for the end of a call, with the server's words or with `message`.

    It is a `grpc.RpcError` too, with `code()`, `details()` and `trailing_metadata()`, so callers of DeepSpeed-MII's
    client catch what they used to.
    """
    code, metadata = call.code(), tuple((str(key), value) for key, value in call.trailing_metadata() or ())
    message = message or call.details() or f"the call ended with {code}"
    return _rebuild(_class_name(code, dict(metadata)), message, code, metadata)


def _class_name(code: grpc.StatusCode, metadata: dict[str, Any]) -> str:
    """The class that the server named, where it is one that the status stands for."""
    general = _ERRORS.get(code, errors.GenerationError)
    named = getattr(errors, str(metadata.get(KIND, "")), general)
    fits = isinstance(named, type) and issubclass(named, general)
    return named.__name__ if fits else general.__name__


def _rebuild(name: str, message: str, code: grpc.StatusCode, metadata: tuple[tuple[str, Any], ...]) -> MIIError:
    error = _with_status(name)(message)
    error.__dict__.update(_code=code, _metadata=metadata)
    if isinstance(error, ServerBusyError):
        wait = dict(metadata).get(RETRY_AFTER, "")
        error.retry_after = int(wait) / 1000 if str(wait).isdigit() else None
    return error


class _Status(grpc.RpcError):
    """How a call ended."""

    _code: grpc.StatusCode
    _metadata: tuple[tuple[str, Any], ...]

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return str(self)

    def trailing_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self._metadata

    def __reduce__(self) -> Any:
        return _rebuild, (type(self).__name__, str(self), self._code, self._metadata)


@cache
def _with_status(name: str) -> type[MIIError]:
    """The class of that name, as a `grpc.RpcError`; it still prints as `mii.errors.<name>`."""
    return type(name, (getattr(errors, name), _Status), {"__module__": errors.__name__})


def _details(error: Exception) -> str:
    known = isinstance(error, (ValidationError, MIIError))
    text = explain(error) if known else f"{type(error).__name__}: {error}"
    return text if len(text) <= _LONGEST_DETAILS else text[: _LONGEST_DETAILS - 3] + "..."
