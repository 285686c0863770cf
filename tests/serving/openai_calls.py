"""The OpenAI routes over a backend of the tests, and what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

from mii.entrypoints.openai_api_server import create_app
from tests.serving.fake_backend import HttpFixture, serving

__all__ = ["KEYS", "MESSAGES", "asking", "openai_server", "raw_events"]

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello to me"}]
KEYS = {"id", "object", "created", "model", "system_fingerprint", "choices"}


@contextmanager
def openai_server() -> Iterator[HttpFixture]:
    with serving(create_app, aliases=("demo",), response_role="helper") as fixture:
        yield fixture


@contextmanager
def asking(server: HttpFixture) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def raw_events(server: HttpFixture, route: str, **body: Any) -> list[Any]:
    """The events of a stream as JSON; the last line must be [DONE]."""
    response = server.http.post(f"/v1/{route}", json={"model": "tiny", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
