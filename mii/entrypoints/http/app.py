"""The FastAPI app that every HTTP server of mii is built on: errors, health, metrics, the connection below."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry
from pydantic.json_schema import models_json_schema
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mii
from mii.entrypoints.http.backend import Backend
from mii.entrypoints.http.bodies import ApiModel
from mii.entrypoints.http.errors import ApiError, on_api_error, on_http_exception, on_surprise
from mii.entrypoints.http.metrics import Meter
from mii.entrypoints.http.service import HttpService
from mii.entrypoints.http.settings import CorsSettings, HttpSettings
from mii.entrypoints.http.streaming import BODY_SEND, ClientGoneError, on_client_gone
from mii.launch.loop import settle

__all__ = ["build_app", "request_id"]

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")
_NAME = "x-request-id"


def build_app(settings: HttpSettings, title: str, bodies: Sequence[type[ApiModel]]) -> tuple[FastAPI, HttpService]:
    """An app without routes, and what its routes share.

    Args:
        settings: of the server.
        title: for the documentation.
        bodies: models of the request bodies that routes refer to with `body_schema`.
    """
    registry = CollectorRegistry()
    service = HttpService(
        settings, Backend(settings.balancer, settings.timeout, settings.socket), Meter(registry), registry
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.backend.open()
        settle()
        yield
        await service.backend.close()

    app = FastAPI(title=title, version=mii.__version__, lifespan=lifespan, redirect_slashes=False)
    app.openapi = lambda: _openapi(app, bodies)  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_surprise)
    for gone in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(gone, on_client_gone)
    if settings.cors is not None:
        _allow_origins(app, settings.cors)
    app.add_middleware(_RequestIds)
    return app, service


def request_id(scope: Scope) -> str:
    """What a request is called: by its caller in ``X-Request-Id``, else by us."""
    return str(scope.get("mii_request_id", ""))


class _RequestIds:
    """Names each request, and says so in its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = scope["mii_request_id"] = _given_id(scope["headers"]) or uuid.uuid4().hex

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_NAME] = name
            await send(message)

        scope.setdefault(BODY_SEND, send)
        await self._app(scope, receive, send_named)


def _given_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    given = next((value.decode("latin-1") for name, value in headers if name == _NAME.encode()), "")
    return given if _REQUEST_ID.fullmatch(given) else ""


def _allow_origins(app: FastAPI, cors: CorsSettings) -> None:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(cors.origins),
        allow_methods=list(cors.methods),
        allow_headers=list(cors.headers),
        allow_credentials=cors.credentials,
        expose_headers=[_NAME, "retry-after"],
    )


def _openapi(app: FastAPI, bodies: Sequence[type[ApiModel]]) -> dict[str, Any]:
    """The routes' own description, and the models that their bodies refer to."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, models = models_json_schema(
            [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
        )
        schema.setdefault("components", {}).setdefault("schemas", {}).update(models.get("$defs", {}))
        app.openapi_schema = schema
    return app.openapi_schema
