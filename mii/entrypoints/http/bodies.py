"""Request bodies: read up to a bound, decoded strictly, checked against a model, refused in sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.requests import Request

from mii.entrypoints.http.errors import ApiError, bad_request
from mii.validation import suggest

__all__ = ["DEFAULT_BODY_BYTES", "ApiModel", "InvalidBodyError", "body_schema", "read_body"]

DEFAULT_BODY_BYTES = 16 << 20
_LONGEST_VALUE = 80
_SHOWN_ERRORS = 5
_decode = msgspec.json.Decoder().decode
Model = TypeVar("Model", bound="ApiModel")


class InvalidBodyError(ApiError):
    """400: the body is JSON, and not what it must be."""


class ApiModel(BaseModel):
    """A request's body, or an object in it. No coercion: a number in quotes is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that other servers have and this one has not, with the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in cls.refused.keys() & data.keys():
            value, neutral = data[name], (None, *cls.refused[name])
            if not any(type(value) is type(each) and value == each for each in neutral):
                message = f"{name}={_short(value)} is not supported here; leave {name!r} out"
                raise InvalidBodyError(400, message, param=name)
        return {name: value for name, value in data.items() if not cls._asks_for_nothing(name, value)}

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        """Whether it is a neutral value, or the null of another server's field: some clients write all they know."""
        unknown = cls.model_config.get("extra") == "forbid" and name not in cls.model_fields
        return name in cls.refused or (value is None and unknown)


async def read_body(request: Request, model: type[Model], limit: int) -> Model:
    """The body of a request.

    Args:
        request: whose body was not read yet.
        model: what it must be.
        limit: bytes at most.

    Raises:
        InvalidBodyError: 400: it is not what `model` says.
        ApiError: 415: it is not called JSON. 413: it is too long. 400: it is no JSON.
        starlette.requests.ClientDisconnect: the client has gone while it was sending.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"the content type is {kind or 'not given'!r}; send 'Content-Type: application/json'")
    try:
        return model.model_validate(_loads(await _receive(request, limit)))
    except ValidationError as error:
        raise _explain(model, error) from error


def body_schema(model: type[ApiModel]) -> dict[str, Any]:
    """The part of an OpenAPI operation that says that its body is `model`."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


async def _receive(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise _too_long(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_long(limit)
        parts.append(part)
    return b"".join(parts)


def _too_long(limit: int) -> ApiError:
    # The rest of the body is not read, so the connection is of no more use.
    message = f"the body has more than {limit} bytes, which is the most that is taken; send less at once"
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def _loads(body: bytes) -> Any:
    try:
        return _decode(body)
    except RecursionError:
        raise bad_request("the body is JSON that is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # the latter from msgspec before 0.23
        raise bad_request(_not_utf8(body) or _half_pair(body) or f"the body is not valid JSON: {error}") from None


def _not_utf8(body: bytes) -> str:
    """Where a body is not UTF-8, or an empty string."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f"the body is not UTF-8: {error.reason} at byte {error.start}"
    return ""


def _half_pair(body: bytes) -> str:
    """What is wrong with a body that is JSON but for half of an escaped surrogate pair, or an empty string."""
    try:
        text = json.dumps(json.loads(body), ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as error:
        return f"the body has a text with {text[error.start]!r}, half of a surrogate pair; send whole characters"
    except (ValueError, RecursionError):
        return ""
    return ""


def _explain(model: type[ApiModel], error: ValidationError) -> ApiError:
    lines = error.errors(include_url=False)
    shown = [_sentence(model, line) for line in lines[:_SHOWN_ERRORS]]
    if len(lines) > len(shown):
        shown.append(f"and {len(lines) - len(shown)} more")
    first = lines[0]["loc"]
    return InvalidBodyError(400, "; ".join(shown), param=str(first[0]) if first else None)


def _sentence(model: type[ApiModel], line: Any) -> str:
    where = ".".join(str(part) for part in line["loc"])
    if line["type"] == "missing":
        return f"{where} is required"
    if line["type"] == "extra_forbidden":
        near = suggest(where, model.model_fields) if len(line["loc"]) == 1 else ""
        return f"there is no field {where!r}{near}"
    if line["type"] in ("value_error", "assertion_error"):
        words = str(line["ctx"]["error"])
        return f"{where}: {words}" if where else words
    words = str(line["msg"]).replace("Input should be", "must be")
    if not where:
        return "the body must be a JSON object"
    return f"{where}={_short(line['input'])} {words}" if words.startswith("must") else f"{where}: {words}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
