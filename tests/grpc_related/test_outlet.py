"""What is to be said goes out at once while there is room, in order, and never two messages at a time."""

from __future__ import annotations

import asyncio

import pytest

from mii.grpc_related.outlet import Outlet, begin


class Pipe:
    """Somebody who says letters, and a reader who has room or not."""

    def __init__(self) -> None:
        self.letters = ""
        self.sent: list[bytes] = []
        self.room = asyncio.Event()
        self.room.set()
        self.over = False
        self.writing = 0
        self.outlet = Outlet(self._collect, self._send, lambda: self.over and not self.letters)

    def say(self, letters: str) -> None:
        self.letters += letters
        self.outlet.wake()

    def end(self) -> None:
        self.over = True
        self.outlet.wake()

    def _collect(self) -> bytes:
        said, self.letters = self.letters, ""
        return said.encode()

    async def _send(self, message: bytes) -> None:
        assert not self.writing
        self.writing += 1
        if message == b"!":
            raise ConnectionResetError
        self.sent.append(message)
        await self.room.wait()
        self.writing -= 1


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_comes_in_one_turn_is_one_message_and_goes_out_in_the_next() -> None:
    async def main() -> None:
        pipe = Pipe()
        running = asyncio.ensure_future(pipe.outlet.run())
        await turns()
        pipe.say("a")
        pipe.say("b")
        await asyncio.sleep(0)
        assert pipe.sent == [b"ab"]
        pipe.end()
        await asyncio.wait_for(running, 1)

    asyncio.run(main())


def test_while_there_is_no_room_what_comes_waits_and_goes_out_together() -> None:
    async def main() -> None:
        pipe = Pipe()
        running = asyncio.ensure_future(pipe.outlet.run())
        pipe.room.clear()
        for letter in "abc":
            pipe.say(letter)
            await turns()
        assert pipe.sent == [b"a"]
        pipe.end()
        await turns()
        assert not running.done()
        pipe.room.set()
        await asyncio.wait_for(running, 1)
        assert pipe.sent == [b"a", b"bc"]

    asyncio.run(main())


def test_what_is_said_before_it_runs_is_not_lost() -> None:
    async def main() -> None:
        pipe = Pipe()
        pipe.room.clear()
        pipe.say("a")
        await turns()
        pipe.say("b")
        pipe.end()
        running = asyncio.ensure_future(pipe.outlet.run())
        await turns()
        pipe.room.set()
        await asyncio.wait_for(running, 1)
        assert pipe.sent == [b"a", b"b"]

    asyncio.run(main())


def test_a_message_that_cannot_be_sent_ends_it_with_the_error() -> None:
    async def main() -> None:
        pipe = Pipe()
        running = asyncio.ensure_future(pipe.outlet.run())
        await turns()
        pipe.say("!")
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(running, 1)
        pipe.say("more")  # nobody sends it
        await turns()
        assert pipe.sent == []

    asyncio.run(main())


def test_when_it_is_cancelled_the_message_that_waits_is_given_up() -> None:
    async def main() -> None:
        pipe = Pipe()
        running = asyncio.ensure_future(pipe.outlet.run())
        pipe.room.clear()
        pipe.say("a")
        await turns(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        pipe.room.set()
        pipe.say("b")
        await turns()
        assert pipe.sent == [b"a"]

    asyncio.run(main())


def test_what_has_begun_is_finished_by_whoever_awaits_the_rest() -> None:
    async def main() -> None:
        steps: list[str] = []
        gate = asyncio.Event()

        async def work() -> None:
            steps.append("begun")
            await gate.wait()
            steps.append("done")

        rest = begin(work())
        assert rest is not None and steps == ["begun"]
        asyncio.get_running_loop().call_soon(gate.set)
        await rest
        assert steps == ["begun", "done"]
        assert begin(work()) is None and steps[-1] == "done"

    asyncio.run(main())
