"""What an HTTP server is told: where the deployment is, what it is called, who may use it, and how."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from mii.entrypoints.http.bodies import DEFAULT_BODY_BYTES
from mii.entrypoints.http.errors import wrong_key

__all__ = ["API_KEYS_ENV", "ApiKeys", "CorsSettings", "HttpSettings", "read_api_keys"]

API_KEYS_ENV = "API_KEYS"


class ApiKeys:
    """The keys that callers may show. Comparing takes the same time whatever is shown.

    Args:
        keys: none: everybody may call.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    async def check(self, request: Request) -> None:
        """Lets a request with a right ``Authorization: Bearer KEY`` pass, or any where there are no keys.

        Raises:
            ApiError: 401.
        """
        if not self._digests:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # as headers are decoded
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise wrong_key(bool(key))


@dataclass(frozen=True)
class CorsSettings:
    """Which web pages of other origins may call; `["*"]` is every one."""

    origins: tuple[str, ...] = ("*",)
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False


@dataclass(frozen=True)
class HttpSettings:
    """All that an app is made from.

    Args:
        balancer: ``host:port`` of the deployment's load balancer.
        model: the name that OpenAI's routes list.
        aliases: other names of the model that requests may use.
        deployment: the name in ``/mii/<name>``.
        api_keys: who may call.
        cors: None: no page of another origin may call.
        chat_template: a Jinja template in place of the model's own.
        response_role: the role of the model's turns in chats.
        timeout: seconds that a request may take; None: any.
        body_bytes: of a request, at most.
        socket: where the load balancer takes calls of processes of its machine; None: it is only spoken to in gRPC.
    """

    balancer: str
    model: str
    aliases: tuple[str, ...] = ()
    deployment: str = ""
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    cors: CorsSettings | None = None
    chat_template: str | None = None
    response_role: str = "assistant"
    timeout: float | None = None
    body_bytes: int = DEFAULT_BODY_BYTES
    socket: Path | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the model has."""
        return tuple(dict.fromkeys((self.model, *self.aliases)))

    def is_served(self, model: str | None) -> bool:
        """Whether a request may name `model`."""
        return model in self.names


def read_api_keys(given: str | None = None, file: str | None = None) -> ApiKeys:
    """The keys from a comma-separated string, else from a file with one on each line, else from `API_KEYS`.

    Raises:
        OSError: the file cannot be read.
        ValueError: a key was asked for and none is there.
    """
    if given is not None:
        source, keys = "the API keys given", given.split(",")
    elif file is not None:
        source, keys = file, Path(file).read_text(encoding="utf-8").splitlines()
    else:
        keys = os.environ.get(API_KEYS_ENV, "").split(",")
        return ApiKeys(key.strip() for key in keys if key.strip())
    found = [key.strip() for key in keys if key.strip()]
    if not found:
        raise ValueError(f"{source}: there is no key; leave the option out to let everybody call")
    return ApiKeys(found)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
