"""Health routes: of this process, and of the engines behind it."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import PlainTextResponse, Response

from mii.entrypoints.http.errors import ApiError
from mii.entrypoints.http.service import HttpService, json_response

__all__ = ["add_health"]


def add_health(app: FastAPI, service: HttpService) -> None:
    """Adds ``/health``, which says more, and ``/healthz``, which says "ok". Both are 503 where no engine answers; and
    ``/livez``, which says only that this process answers, whatever it has behind it.
    """

    @app.get("/livez")
    async def livez() -> Response:
        return PlainTextResponse("ok")

    @app.get("/health")
    async def health() -> Response:
        reply = await service.backend.health()
        if not reply.ready:
            raise _not_ready(reply.reason)
        replicas = [{"ready": replica.ready, "outstanding": replica.outstanding} for replica in reply.replicas]
        return json_response({"status": "ok", "replicas": replicas})

    @app.get("/healthz")
    async def healthz() -> Response:
        reply = await service.backend.health()
        if not reply.ready:
            raise _not_ready(reply.reason)
        return PlainTextResponse("ok")


def _not_ready(reason: str) -> ApiError:
    return ApiError(503, f"not ready: {reason}", code="unavailable", headers={"Retry-After": "1"})
