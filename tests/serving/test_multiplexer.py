"""What a replica says of many calls, in which messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from mii.grpc_related.multiplex import Calls, Multiplexer
from mii.grpc_related.proto.modelresponse_pb2 import CallerMessage, CallReply, CallStart, ServerMessage
from mii.grpc_related.wire import reply_bytes
from tests.serving.calls import in_loop


class Said:
    """A call's generation that always has something to say."""

    ended = False


def test_a_step_goes_out_in_parts_while_it_is_being_made() -> None:
    async def main() -> None:
        tells: list[Callable[[], object]] = []
        sent: list[list[int]] = []

        async def open_call(request: Any, tell: Callable[[], object]) -> Any:
            tells.append(tell)
            return Said()

        async def send(message: bytes) -> None:
            sent.append([reply.call for reply in ServerMessage.FromString(message).replies])

        def write(number: int, generation: Any, seconds: float) -> bytes:
            return reply_bytes(CallReply(call=number))

        async def messages() -> AsyncIterator[CallerMessage]:
            yield CallerMessage(starts=[CallStart(call=number) for number in range(1, 41)])
            await asyncio.sleep(60)

        calls = Calls(open=open_call, close=lambda generation: None, write=write, ended=lambda *_: None)
        serving = asyncio.ensure_future(Multiplexer(calls, send).serve(messages()))
        while len(tells) < 40:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        for tell in tells[:35]:  # what a step's tokens do
            tell()
        assert sent == [list(range(1, 21))]
        await asyncio.sleep(0)
        assert sent[1:] == [list(range(21, 36))]
        for tell in tells[:5]:
            tell()
        assert len(sent) == 2  # few are worth no message of their own
        await asyncio.sleep(0)
        assert sent[2:] == [list(range(1, 6))]
        serving.cancel()
        await asyncio.wait((serving,))

    in_loop(main())
