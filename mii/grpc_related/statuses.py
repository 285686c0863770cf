"""Which gRPC status an error becomes."""

from __future__ import annotations

import grpc
from pydantic import ValidationError

from mii.errors import MIIError, RequestError, ServerBusyError, ServerUnavailableError
from mii.validation import explain

__all__ = ["RETRY_AFTER", "Status", "status_of"]

RETRY_AFTER = "retry-after-ms"
"""Trailing metadata of RESOURCE_EXHAUSTED: milliseconds after which there may be room."""

_LONGEST_DETAILS = 4000  # characters; details travel as a header, and headers of more than 8 KiB are refused
Status = tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]


def status_of(error: Exception) -> Status:
    """Code, details and trailing metadata. Errors that nobody expects are INTERNAL, with their type's name."""
    code = _code_of(error)
    if isinstance(error, ServerBusyError) and error.retry_after is not None:
        return code, _details(error), ((RETRY_AFTER, str(round(error.retry_after * 1000))),)
    return code, _details(error), ()


def _code_of(error: Exception) -> grpc.StatusCode:
    if isinstance(error, (ValidationError, RequestError)):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, ServerBusyError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, ServerUnavailableError):
        return grpc.StatusCode.UNAVAILABLE
    return grpc.StatusCode.INTERNAL


def _details(error: Exception) -> str:
    known = isinstance(error, (ValidationError, MIIError))
    text = explain(error) if known else f"{type(error).__name__}: {error}"
    return text if len(text) <= _LONGEST_DETAILS else text[: _LONGEST_DETAILS - 3] + "..."
