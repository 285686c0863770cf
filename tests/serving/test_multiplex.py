"""Many calls in one stream, through the load balancer to replicas with stand-in engines, and what their ends leave."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from mii.backend.bundled import BundledCall
from mii.entrypoints.http.backend import Backend, Call
from mii.errors import ServerUnavailableError
from mii.grpc_related.convert import pack_request
from mii.grpc_related.dispatch import Dispatcher
from mii.grpc_related.links import Link
from mii.grpc_related.options import CHANNEL_OPTIONS, SERVICE_NAME
from mii.grpc_related.proto.modelresponse_pb2 import CallerMessage, CallStart, ServerMessage
from mii.grpc_related.statuses import status_of
from mii.grpc_related.switchboard import Switchboard
from mii.grpc_related.trunk import Trunk
from tests.serving.calls import in_loop
from tests.serving.clusters import Cluster, shared_cluster
from tests.serving.crowd import stand_in_text
from tests.serving.standin import Options

QUEUE = 48


@pytest.fixture(scope="module")
def shared(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = Options(step_seconds=0.004, max_length=100_000)
    with shared_cluster(tmp_path_factory, tiny_llama, options=options, queue_size=QUEUE) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """Nothing of any call is left when a test ends."""
    yield shared
    shared.wait_idle()


class Caller:
    """Calls over one trunk, and what came of them.

    Args:
        channel: to the load balancer.
    """

    def __init__(self, channel: Any) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self.trunk = Trunk(channel.stream_stream(f"/{SERVICE_NAME}/Multiplex"), self._deliver, self.reads)
        self.texts: dict[int, str] = defaultdict(str)
        self.reasons: dict[int, str] = {}
        self.messages = 0
        self._numbers = itertools.count(1)

    async def ask(self, *prompts: str, number: int | None = None, **options: Any) -> str:
        """The text of an answer, once it has ended."""
        number = next(self._numbers) if number is None else number
        await self.trunk.run(CallStart(call=number, request=pack_request(prompts, options).SerializeToString()))
        assert self.reasons[number] == "length"
        return self.texts[number]

    def _deliver(self, raw: bytes, message: ServerMessage) -> None:
        self.messages += 1
        for reply in message.replies:
            for piece in reply.response:
                self.texts[reply.call] += piece.response
                if piece.finish_reason != "none":
                    self.reasons[reply.call] = piece.finish_reason


@asynccontextmanager
async def calling(cluster: Cluster) -> AsyncIterator[Caller]:
    async with grpc.aio.insecure_channel(cluster.address, [*CHANNEL_OPTIONS]) as channel:
        caller = Caller(channel)
        try:
            yield caller
        finally:
            await caller.trunk.close()


async def code_of(work: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await work
    return caught.value.code(), caught.value.details() or ""


def test_each_call_gets_its_own_answer_and_messages_are_shared(cluster: Cluster) -> None:
    async def main() -> None:
        async with calling(cluster) as caller:
            prompts = [f"prompt-{number}" for number in range(60)]
            texts = await asyncio.gather(*(caller.ask(prompt, max_new_tokens=50) for prompt in prompts))
            assert texts == [stand_in_text(prompt, 50) for prompt in prompts]
            assert caller.messages < 60 * 50 / 4

    in_loop(main())


def test_both_replicas_get_their_share(cluster: Cluster) -> None:
    before = [cluster.prompts_of(replica) for replica in range(2)]

    async def main() -> None:
        async with calling(cluster) as caller:
            await asyncio.gather(*(caller.ask(f"share-{number}", max_new_tokens=20) for number in range(20)))

    in_loop(main())
    after = [cluster.prompts_of(replica) for replica in range(2)]
    assert all(later - earlier >= 5 for later, earlier in zip(after, before, strict=True))


def test_a_call_that_is_wrong_ends_alone_and_says_why(cluster: Cluster) -> None:
    async def main() -> None:
        async with calling(cluster) as caller:
            good = asyncio.ensure_future(caller.ask("good", max_new_tokens=100))
            assert await code_of(caller.ask("x", max_new_token=3)) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "unknown option 'max_new_token'; did you mean 'max_new_tokens'?",
            )
            code, words = await code_of(caller.ask("a", "b"))
            assert code is grpc.StatusCode.INVALID_ARGUMENT and "has one prompt" in words
            garbage = CallStart(call=999, request=b"\xff\xff")
            code, words = await code_of(caller.trunk.run(garbage))
            assert (code, words) == (grpc.StatusCode.INVALID_ARGUMENT, "the request is no MultiStringRequest")
            assert await good == stand_in_text("good", 100)

    in_loop(main())


def test_calls_past_the_queues_are_refused_with_a_time_to_come_back(cluster: Cluster) -> None:
    async def main() -> None:
        async with calling(cluster) as caller:
            asked = [
                asyncio.ensure_future(caller.ask(f"crowd-{number}", max_new_tokens=400)) for number in range(2 * QUEUE)
            ]
            while cluster_calls(caller) < 2 * QUEUE:
                await asyncio.sleep(0.02)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await caller.ask("late", max_new_tokens=1)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(dict(caught.value.trailing_metadata() or ())["retry-after-ms"]) > 0
            for work in asked:
                work.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def cluster_calls(caller: Caller) -> int:
        return len(caller.texts)

    in_loop(main())


def test_a_call_that_is_cancelled_frees_what_it_has_while_others_go_on(cluster: Cluster) -> None:
    async def main() -> None:
        async with calling(cluster) as caller:
            other = asyncio.ensure_future(caller.ask("other", max_new_tokens=300))
            endless = asyncio.ensure_future(caller.ask("endless", number=77, max_new_tokens=90_000))
            while not caller.texts[77]:
                await asyncio.sleep(0.01)
            endless.cancel()
            while (await asyncio.to_thread(cluster.client.stats))["balancer"]["outstanding"] > 1:
                await asyncio.sleep(0.02)
            assert await other == stand_in_text("other", 300)

    in_loop(main())


def test_a_caller_that_hangs_up_cancels_all_of_its_calls(cluster: Cluster) -> None:
    async def main() -> None:
        async with calling(cluster) as caller:
            asked = [asyncio.ensure_future(caller.ask(f"gone-{number}", max_new_tokens=90_000)) for number in range(10)]
            while len(caller.texts) < 10:
                await asyncio.sleep(0.01)
        for ended in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(ended, grpc.aio.AioRpcError)

    in_loop(main())


def test_a_caller_that_does_not_read_holds_up_nobody_and_gets_everything(cluster: Cluster) -> None:
    async def main() -> None:
        async with calling(cluster) as slow, calling(cluster) as quick:
            slow.reads.clear()
            waiting = [asyncio.ensure_future(slow.ask(f"slow-{number}", max_new_tokens=500)) for number in range(20)]
            assert await quick.ask("quick", max_new_tokens=400) == stand_in_text("quick", 400)
            await asyncio.sleep(1.0)
            slow.reads.set()
            assert await asyncio.gather(*waiting) == [stand_in_text(f"slow-{number}", 500) for number in range(20)]
            assert slow.messages < 300  # of five hundred steps on each of two replicas

    in_loop(main())


@pytest.mark.parametrize("part", ["front", "engine"])
def test_what_a_dead_replica_had_not_begun_goes_elsewhere_and_the_rest_is_told(cluster: Cluster, part: str) -> None:
    role = cluster.front(0) if part == "front" else cluster.engine(0)

    async def main() -> int:
        async with calling(cluster) as caller:
            asked = [asyncio.ensure_future(caller.ask(f"{part}-{number}", max_new_tokens=700)) for number in range(16)]
            while len(caller.texts) < 16:
                await asyncio.sleep(0.01)
            killed = cluster.kill(role)
            ends = await asyncio.gather(*asked, return_exceptions=True)
            lost = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
            assert 0 < len(lost) < 16
            assert {error.code() for error in lost} == {grpc.StatusCode.UNAVAILABLE}
            for number, end in enumerate(ends):
                if isinstance(end, str):
                    assert end == stand_in_text(f"{part}-{number}", 700)
            assert await caller.ask("after", max_new_tokens=5) == stand_in_text("after", 5)
            return killed

    cluster.wait_back(role, in_loop(main()))


def test_after_the_load_balancer_was_lost_the_next_call_finds_the_new_one(cluster: Cluster) -> None:
    async def main() -> None:
        async with calling(cluster) as caller:
            asked = asyncio.ensure_future(caller.ask("lost", number=5, max_new_tokens=90_000))
            while not caller.texts[5]:
                await asyncio.sleep(0.01)
            killed = cluster.kill(cluster.balancer)
            assert (await code_of(asked))[0] is grpc.StatusCode.UNAVAILABLE
            await asyncio.to_thread(cluster.wait_back, cluster.balancer, killed)
            while True:
                try:
                    assert await caller.ask("again", max_new_tokens=5) == stand_in_text("again", 5)
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    await asyncio.sleep(0.05)

    in_loop(main())


async def read_all(call: BundledCall) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    while pieces := await call.take():
        for piece in pieces:
            texts[piece.index] += piece.response
    return texts


def test_the_http_side_tries_again_while_nothing_of_an_answer_has_come(cluster: Cluster) -> None:
    async def main() -> None:
        backend = Backend(cluster.address)
        backend.open()
        try:
            killed = cluster.kill(cluster.balancer)
            call = Call(["one", "two"], {"max_new_tokens": 6})
            async with backend.stream(call) as stream:
                texts = await read_all(stream)
            assert texts == {0: stand_in_text("one", 6), 1: stand_in_text("two", 6)}
            await asyncio.to_thread(cluster.wait_back, cluster.balancer, killed)
            async with backend.stream(Call(["x"], {"max_new_tokens": 90_000})) as endless:
                await endless.take()
                killed = cluster.kill(cluster.balancer)
                with pytest.raises(ServerUnavailableError):
                    await read_all(endless)
            await asyncio.to_thread(cluster.wait_back, cluster.balancer, killed)
        finally:
            await backend.close()

    in_loop(main())


def test_a_drain_lets_calls_end_and_refuses_new_ones(cluster: Cluster) -> None:
    async def main() -> int:
        async with calling(cluster) as caller:
            asked = asyncio.ensure_future(caller.ask("draining", number=9, max_new_tokens=500))
            while not caller.texts[9]:
                await asyncio.sleep(0.01)
            stopped = cluster.kill(cluster.balancer, signal.SIGTERM)
            await asyncio.sleep(0.3)
            code, _ = await code_of(caller.ask("late", number=10, max_new_tokens=5))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert await asked == stand_in_text("draining", 500)
            return stopped

    cluster.wait_back(cluster.balancer, in_loop(main()))


class LostCall:
    """A stream whose write finds before its read that the connection is gone, as gRPC tells it then."""

    async def read(self) -> Any:
        metadata = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, metadata, metadata, "Internal error from Core")

    async def write(self, message: bytes) -> None:
        await asyncio.sleep(60)

    def cancel(self) -> None: ...


def test_a_connection_that_is_lost_in_the_middle_of_a_write_is_lost_and_no_mistake_of_anyone() -> None:
    async def main() -> None:
        trunk = Trunk(LostCall, lambda raw, message: None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await trunk.run(CallStart(call=1))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    in_loop(main())


class OpenCall:
    """A stream to a replica that says nothing."""

    def __init__(self) -> None:
        self.cancelled = False

    async def read(self) -> Any:
        await asyncio.sleep(60)

    async def write(self, message: bytes) -> None: ...

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize("cancels", [1, 2, 3])
def test_a_caller_that_is_gone_leaves_no_stream_to_a_replica_however_often_it_is_noticed(cancels: int) -> None:
    async def one_call() -> AsyncIterator[CallerMessage]:
        yield CallerMessage(starts=[CallStart(call=1, request=pack_request(["x"], {}).SerializeToString())])
        await asyncio.sleep(60)

    async def main() -> None:
        call, link = OpenCall(), Link(0, "127.0.0.1:1", QUEUE)
        link.ready, link.multiplex = True, lambda: call
        send: Any = lambda message: asyncio.sleep(0)  # noqa: E731
        board = Switchboard(Dispatcher([link]), send, status=status_of, ended=lambda code: None)
        serving = asyncio.ensure_future(board.serve(one_call()))
        while not link.prompts:
            await asyncio.sleep(0.01)
        for _ in range(cancels):
            serving.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await serving
        while not call.cancelled or link.prompts:
            await asyncio.sleep(0.01)
        await link.close()

    in_loop(main(), 20)
