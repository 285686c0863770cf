"""The OpenAI routes as a router for any app."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from mii.entrypoints.http.bodies import body_schema
from mii.entrypoints.http.errors import ApiError
from mii.entrypoints.http.service import HttpService, json_response
from mii.entrypoints.openai.chat import create_chat_completion
from mii.entrypoints.openai.completions import create_completion
from mii.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest

__all__ = ["BODIES", "openai_router"]

BODIES = (ChatCompletionRequest, CompletionRequest)
"""Models of the routes' bodies."""


def openai_router(service: HttpService) -> APIRouter:
    """Models, completions and chat completions.

    Args:
        service: who answers.
    """
    router = APIRouter(prefix="/v1", tags=["openai"], dependencies=[Depends(service.settings.api_keys.check)])
    cards = {name: model_card(name, service.settings.model) for name in service.settings.names}

    @router.get("/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": list(cards.values())})

    @router.get("/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        if name not in cards:
            raise ApiError(
                404, f"there is no model {name!r}; {service.settings.model!r} is here", code="model_not_found"
            )
        return json_response(cards[name])

    @router.post("/completions", openapi_extra=body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await create_completion(service, request)

    @router.post("/chat/completions", openapi_extra=body_schema(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(service, request)

    return router


def model_card(name: str, root: str) -> dict[str, Any]:
    """What the list of models says of one.

    Args:
        name: its id.
        root: the id of the model that it is.
    """
    now = int(time.time())
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": now,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": True,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": now,
        "owned_by": "deepspeed-mii",
        "root": root,
        "parent": None,
        "permission": [permission],
    }
