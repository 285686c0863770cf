"""A replica's front process over a stand-in engine: answers, streams, refusals, ends of calls, and what they leave."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import SERVICE_NAME
from mii.launch.process import StopWanted
from mii.modeling.tokenizers import MIITokenizerWrapper, load_tokenizer
from tests.serving.calls import Streamed, ask, connected, in_loop, status, stream
from tests.serving.deployments import wait_until
from tests.serving.replicas import Replica, running_replica
from tests.serving.standin import Options, answer

QUEUE = 64


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> MIITokenizerWrapper:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def shared(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    options = Options(step_seconds=0.002, vocab_size=49152, max_length=2_000_000, num_blocks=1 << 16)
    with running_replica(tmp_path_factory.mktemp("r") / "d", smollm2, options=options, queue_size=QUEUE) as replica:
        yield replica


@pytest.fixture
def replica(shared: Replica) -> Iterator[Replica]:
    """Nothing of any request is left when a test ends."""
    yield shared
    shared.wait_idle()


def said(tokenizer: MIITokenizerWrapper, prompt: str | list[int], count: int) -> str:
    """The text that the stand-in answers."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return tokenizer.decode([answer(ids, position) for position in range(count)])


def test_a_call_gets_its_answers_in_the_order_of_its_prompts(replica: Replica, tokenizer: MIITokenizerWrapper) -> None:
    prompts: list[str | list[int]] = ["DeepSpeed is", [5, 6, 7], "Seattle is", "DeepSpeed is"]

    async def run() -> list[Any]:
        async with connected(replica.address) as stub:
            return await ask(stub, prompts, max_new_tokens=20)

    replies = sorted(in_loop(run()), key=lambda reply: reply.index)
    assert [reply.index for reply in replies] == [0, 1, 2, 3]
    assert [reply.response for reply in replies] == [said(tokenizer, prompt, 20) for prompt in prompts]
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.prompt_tokens == len(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        assert (reply.generated_tokens, reply.finish_reason, reply.error) == (20, "length", "")
        assert 0 < reply.model_time_taken <= reply.time_taken


def test_a_stream_of_several_prompts_says_whose_each_piece_is(replica: Replica, tokenizer: MIITokenizerWrapper) -> None:
    prompts = ["one", "two", "three"]

    async def run() -> Any:
        async with connected(replica.address) as stub:
            return await stream(stub, prompts, max_new_tokens=30)

    streamed = in_loop(run())
    assert streamed.texts == {index: said(tokenizer, prompt, 30) for index, prompt in enumerate(prompts)}
    assert streamed.reasons == dict.fromkeys(range(3), "length")
    for lengths in streamed.lengths.values():
        assert lengths == sorted(lengths) and lengths[-1] == 30


def test_a_lone_stream_gets_each_token_as_it_comes(smollm2: Path, tmp_path: Path) -> None:
    options = Options(step_seconds=0.02, vocab_size=49152)  # on a busy machine, tokens that come faster meet
    with running_replica(tmp_path / "d", smollm2, options=options, queue_size=QUEUE) as replica:

        async def run() -> Any:
            async with connected(replica.address) as stub:
                return await stream(stub, ["hello"], max_new_tokens=50)

        # One for each token and the last one; some may meet, and on a busy machine that may happen to all for a while.
        assert any(in_loop(run()).messages >= 40 for _ in range(5))


def test_stop_strings_and_full_text(replica: Replica, tokenizer: MIITokenizerWrapper) -> None:
    text = said(tokenizer, "hello", 40)
    stop = text[10:14]

    async def run() -> tuple[Any, Any, Any]:
        async with connected(replica.address) as stub:
            options = {"max_new_tokens": 1000, "stop": [stop]}
            first = await ask(stub, ["hello"], **options)
            second = await stream(stub, ["hello"], **options)
            third = await ask(stub, ["hello"], return_full_text=True, stream=True, max_new_tokens=8)
            return first[0], second, third[0]

    unary, streamed, full = in_loop(run())
    assert unary.response == streamed.texts[0] == text[: text.index(stop)]
    assert unary.finish_reason == streamed.reasons[0] == "stop"
    assert full.response == "hello" + text[:8]


def test_no_prompts_no_answers(replica: Replica) -> None:
    async def run() -> tuple[Any, Any]:
        async with connected(replica.address) as stub:
            return await ask(stub, []), await stream(stub, [])

    unary, streamed = in_loop(run())
    assert unary == [] and streamed.messages == 0


WRONG: dict[str, tuple[list[str | list[int]], dict[str, Any], str]] = {
    "an unknown option": (["hi"], {"tempature": 1.0}, "tempature"),
    "a value out of range": (["hi"], {"top_p": 2.0}, "top_p"),
    "a wrong type": (["hi"], {"max_new_tokens": "many"}, "max_new_tokens"),
    "an empty prompt": (["hi", ""], {}, "prompt 1 of 2"),
    "a foreign token": ([[1, 60000]], {}, "60000"),
    "a prompt that leaves no room": (["hi there you"], {"max_length": 2}, "max_length"),
    "a prompt that no cache holds": ([[1, 2], [7] * 500_000], {"max_new_tokens": 600_000}, "prompt 1 of 2"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_what_is_wrong_is_refused_at_once_and_named(replica: Replica, case: str, streams: bool) -> None:
    prompts, options, word = WRONG[case]

    async def run() -> grpc.aio.AioRpcError | None:
        async with connected(replica.address) as stub:
            return await status((stream if streams else ask)(stub, prompts, 20.0, **options))

    error = in_loop(run())
    assert error is not None and error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    assert word in (error.details() or "")


def test_good_calls_do_not_notice_bad_ones(replica: Replica, tokenizer: MIITokenizerWrapper) -> None:
    """200 calls, each right or wrong, unary or streamed, some given up: each gets its own answer or its own error."""
    chance = random.Random(1)
    kinds = [chance.choice(["ask", "stream", "wrong", "cancel"]) for _ in range(200)]
    room = asyncio.Semaphore(QUEUE)

    async def one(stub: Any, number: int, kind: str) -> None:
        prompt, count = f"call {number}", 1 + number % 40
        async with room:
            if kind == "ask":
                (reply,) = await ask(stub, [prompt], max_new_tokens=count)
                assert reply.response == said(tokenizer, prompt, count)
            elif kind == "stream":
                streamed = await stream(stub, [prompt], max_new_tokens=count, temperature=0.1 * count)
                assert streamed.texts[0] == said(tokenizer, prompt, count)
            elif kind == "wrong":
                error = await status(ask(stub, [prompt], top_k=0))
                assert error is not None and error.code() is grpc.StatusCode.INVALID_ARGUMENT
            else:
                call = stub.GeneratorReplyStream(pack_request([prompt], {"max_new_tokens": 100_000}))
                await call.read()
                call.cancel()

    async def run() -> None:
        async with connected(replica.address) as stub:
            await asyncio.gather(*[one(stub, number, kind) for number, kind in enumerate(kinds)])

    in_loop(run())


def test_a_full_queue_refuses_and_says_when_to_come_back(replica: Replica) -> None:
    async def run() -> tuple[list[Any], grpc.aio.AioRpcError | None, Any]:
        async with connected(replica.address) as stub:
            first = asyncio.create_task(ask(stub, ["hi"] * QUEUE, max_new_tokens=400))
            await asyncio.to_thread(wait_until, lambda: replica.stats()["outstanding"] == QUEUE)
            refused = await status(ask(stub, ["one more"], max_new_tokens=1))
            answers = await first
            return answers, refused, await ask(stub, ["now"], max_new_tokens=1)

    answers, refused, later = in_loop(run())
    assert len(answers) == QUEUE and len(later) == 1
    assert refused is not None and refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    wait = dict(refused.trailing_metadata() or ())["retry-after-ms"]
    assert 0 < int(str(wait)) <= 30_000


def test_a_call_larger_than_the_queue_is_taken_when_nothing_else_is_there(replica: Replica) -> None:
    async def run() -> list[Any]:
        async with connected(replica.address) as stub:
            return await ask(stub, ["hi"] * (2 * QUEUE), max_new_tokens=2)

    assert len(in_loop(run())) == 2 * QUEUE


@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_a_deadline_ends_the_call_here_and_in_the_engine(replica: Replica, streams: bool) -> None:
    async def run() -> grpc.aio.AioRpcError | None:
        async with connected(replica.address) as stub:
            return await status((stream if streams else ask)(stub, ["hi"] * 5, 0.3, max_new_tokens=50_000))

    error = in_loop(run())
    assert error is not None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    replica.wait_idle()


def test_a_cancelled_call_frees_all_its_blocks_at_once(replica: Replica) -> None:
    async def run() -> None:
        async with connected(replica.address) as stub:
            call = stub.GeneratorReplyStream(pack_request(["hi"] * 3, {"max_new_tokens": 50_000}))
            await call.read()
            call.cancel()

    in_loop(run())
    seen: list[dict[str, Any]] = []  # each is said between two steps

    def ended() -> bool:
        seen.append(replica.stats()["engine"])
        return (seen[-1]["running"], seen[-1]["waiting"]) == (0, 0)

    wait_until(ended, seen=lambda: seen[-1])
    assert all((engine["running"] == 0) == (engine["free_blocks"] == engine["num_blocks"]) for engine in seen), seen


def test_a_reader_that_is_slow_gets_few_large_pieces_and_holds_nobody_up(
    replica: Replica, tokenizer: MIITokenizerWrapper
) -> None:
    """What it has not read is in one merged piece for each prompt, so hundreds of steps are some messages more."""
    prompts, count = [f"slow {number}" for number in range(QUEUE // 2)], 500

    async def run() -> Streamed:
        streamed = Streamed()
        window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))  # of what is not read yet
        async with connected(replica.address, *window) as slow, connected(replica.address) as quick:
            call = slow.GeneratorReplyStream(pack_request(prompts, {"max_new_tokens": count}))
            streamed.take(await call.read())
            await stream(quick, ["quick"], max_new_tokens=100)
            await asyncio.to_thread(replica.wait_idle, 60.0)  # the slow one's tokens are all there
            while (reply := await call.read()) is not grpc.aio.EOF:
                streamed.take(reply)
        return streamed

    streamed = in_loop(run())
    assert streamed.texts == {place: said(tokenizer, prompt, count) for place, prompt in enumerate(prompts)}
    assert streamed.reasons == dict.fromkeys(range(len(prompts)), "length")
    assert streamed.messages < count / 2


# It keeps its calls: gRPC cancels one that nobody has any more.
VANISHING = """
import asyncio, sys
from mii.grpc_related.convert import pack_request
from tests.serving.calls import connected

async def one(stub, number):
    call = stub.GeneratorReplyStream(pack_request([f"client {number}"], {"max_new_tokens": 50_000}))
    await call.read()
    return call

async def main():
    async with connected(sys.argv[1]) as stub:
        calls = await asyncio.gather(*[one(stub, number) for number in range(int(sys.argv[2]))])
        print("reading", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def vanish(replica: Replica, streams: int) -> None:
    """A process with this many streams is killed in the middle of them."""
    command = [sys.executable, "-c", VANISHING, replica.address, str(streams)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"reading\n"
        process.kill()


def test_clients_that_vanish_leave_nothing(smollm2: Path, tmp_path: Path) -> None:
    """No request, block, descriptor or thread, and no memory that grows with their number."""
    options = Options(step_seconds=0.005, vocab_size=49152, max_length=2_000_000)
    with running_replica(tmp_path / "d", smollm2, options=options) as replica:
        vanish(replica, 50)  # what is made once and kept
        vanish(replica, 200)
        replica.wait_idle()
        before = footprint(replica)
        for _ in range(2):
            vanish(replica, 200)
        replica.wait_idle()
        held = ("threads", "descriptors")
        wait_until(
            lambda: all(footprint(replica)[name] <= before[name] for name in held),
            seen=lambda: (before, footprint(replica)),
        )
        after = footprint(replica)
        # 400 streams more; a kilobyte each would show
        assert after["kilobytes"] - before["kilobytes"] < 8192, (before, after)


def footprint(replica: Replica) -> dict[str, int]:
    assert replica.front.state.pid is not None
    process = Path(f"/proc/{replica.front.state.pid}")
    resident = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
    return {
        "threads": len(list((process / "task").iterdir())),
        "descriptors": len(list((process / "fd").iterdir())),
        "kilobytes": int(resident.split()[1]),
    }


def test_a_large_prompt_does_not_hold_up_others(replica: Replica) -> None:
    """A prompt of a million characters is tokenised while another stream goes on."""
    large = "The quick brown fox jumps over the lazy dog. " * 25_000

    async def run() -> tuple[float, float]:
        async with connected(replica.address) as stub, connected(replica.address) as other:
            call = stub.GeneratorReplyStream(pack_request(["hi"], {"max_new_tokens": 50_000}))
            await call.read()
            asking = asyncio.create_task(ask(other, [large], max_new_tokens=1))
            began = last = time.monotonic()
            longest = 0.0
            while not asking.done():
                await call.read()
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            call.cancel()
            (reply,) = await asking
            assert reply.prompt_tokens > 200_000
            return longest, last - began

    longest, whole = in_loop(run())
    assert longest < max(1.0, whole / 2)  # encoding is most of the whole; where it held the loop up, nothing would come


def test_no_torch_in_the_front(replica: Replica) -> None:
    maps = Path(f"/proc/{replica.front.state.pid}/maps").read_text()
    assert "libtorch" not in maps and "cygrpc" in maps


def test_health_and_reflection(replica: Replica) -> None:
    health = health_pb2_grpc.HealthStub(replica.channel)
    for name in ("", SERVICE_NAME):
        reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    services = ProtoReflectionDescriptorDatabase(replica.channel).get_services()
    assert set(services) == {SERVICE_NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    (entry,) = replica.health().replicas
    assert (entry.ready, entry.vocab_size, entry.max_length, entry.device) == (True, 49152, 2_000_000, "cpu")


def test_statistics_count_what_was_done(replica: Replica) -> None:
    async def run() -> None:
        async with connected(replica.address) as stub:
            await ask(stub, ["a b c", "d"], max_new_tokens=10)
            await status(ask(stub, [""]))

    before = replica.wait_idle()
    in_loop(run())
    after = replica.wait_idle()
    assert after["generated_tokens"] - before["generated_tokens"] == 20
    assert after["finished"]["length"] - before["finished"].get("length", 0) == 2
    assert after["calls"]["INVALID_ARGUMENT"] - before["calls"].get("INVALID_ARGUMENT", 0) == 1
    for name in ("first_token_seconds", "token_seconds", "request_seconds"):
        assert after[name]["count"] - before[name]["count"] == 2
        assert len(after[name]["counts"]) == len(after[name]["bounds"]) + 1
    assert after["engine"]["steps"] > before["engine"]["steps"]


def test_only_the_token_ends_the_deployment(replica: Replica) -> None:
    for metadata in ((), (("mii-token", "guess"),)):
        with pytest.raises(grpc.RpcError) as caught:
            replica.stub.Terminate(Empty(), timeout=5, metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    replica.stub.Terminate(Empty(), timeout=5, metadata=(("mii-token", replica.folder.read_token()),))
    wait_until(lambda: replica.listen() and any(isinstance(message, StopWanted) for _, message in replica.said))
