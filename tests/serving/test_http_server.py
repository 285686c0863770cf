"""How an HTTP server ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI

from mii.entrypoints.http.server import HttpServer, listen
from tests.serving.calls import in_loop


@pytest.mark.parametrize("times", [1, 2])
def test_the_app_ends_in_order_however_often_a_stop_is_asked_for(times: int, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        said.append("begins")
        yield
        await asyncio.sleep(0)
        said.append("ends")

    async def main() -> None:
        server = HttpServer(FastAPI(lifespan=lifespan), listen("127.0.0.1", 0), drain_seconds=5)
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        for _ in range(times):
            server.stop()
        await serving

    in_loop(main())
    assert said == ["begins", "ends"] and not caplog.records
