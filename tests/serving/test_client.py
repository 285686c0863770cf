"""The client over a deployment of stand-in engines: every way to call it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest

import mii
from mii.backend import MIIClient
from mii.batching.data_classes import StreamedResponse
from mii.errors import (
    RequestError,
    RequestTimeoutError,
    ServingError,
)
from mii.modeling.tokenizers import load_tokenizer
from tests.serving.clusters import NAME, Cluster, shared_cluster
from tests.serving.crowd import stand_in_text
from tests.serving.deployments import wait_until
from tests.serving.standin import Options, answer

LONG = 100_000
PROMPTS = ["DeepSpeed is", "Seattle is", "A much longer prompt that differs from the others"]


@pytest.fixture(scope="module")
def shared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = Options(step_seconds=0.001, max_length=2 * LONG, num_blocks=1 << 22)
    with shared_cluster(tmp_path_factory, tiny_llama, options=options) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """Nothing of any call is left when a test ends."""
    yield shared
    shared.wait_idle()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[MIIClient]:
    with MIIClient(cluster.config) as client:
        yield client


@pytest.fixture(scope="module")
def said(tiny_llama: Path) -> Any:
    """The text that a stand-in answers to a prompt with so many tokens."""
    tokenizer = load_tokenizer(tiny_llama)

    def text(prompt: str | list[int], count: int) -> str:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return tokenizer.decode([answer(ids, position) for position in range(count)])

    return text


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# Ways to call


def test_every_way_of_calling_gives_the_same_texts(client: MIIClient, said: Any) -> None:
    expected = [said(prompt, 12) for prompt in PROMPTS]
    assert [response.generated_text for response in client.generate(PROMPTS, max_new_tokens=12) or ()] == expected
    assert [response.generated_text for response in client(PROMPTS, max_new_tokens=12) or ()] == expected
    streamed: dict[int, str] = {}

    def collect(pieces: list[StreamedResponse]) -> None:
        (piece,) = pieces
        streamed[piece.index] = streamed.get(piece.index, "") + piece.generated_text

    def texts() -> list[str]:
        found = [streamed[index] for index in range(len(PROMPTS))]
        streamed.clear()
        return found

    assert client.generate(PROMPTS, collect, max_new_tokens=12) is None
    assert texts() == expected
    for pieces in client.stream(PROMPTS, max_new_tokens=12):
        for piece in pieces:
            collect([piece])
    assert texts() == expected

    async def run() -> None:
        async def collect_later(pieces: list[StreamedResponse]) -> None:
            await asyncio.sleep(0)
            collect(pieces)

        answers = await client.generate_async(PROMPTS, max_new_tokens=12)
        assert [response.generated_text for response in answers or ()] == expected
        for callback in (collect, collect_later):
            assert await client.generate_async(PROMPTS, callback, max_new_tokens=12) is None
            assert texts() == expected
        async for pieces in client.astream(PROMPTS, max_new_tokens=12):
            for piece in pieces:
                collect([piece])
        assert texts() == expected

    asyncio.run(run())


async def only(tasks: set[asyncio.Task[Any]]) -> None:
    """Waits until no others are left: those of gRPC end a moment after their call."""
    for _ in range(500):
        if asyncio.all_tasks() == tasks:
            return
        await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == tasks


def test_streams_of_an_event_loop_share_a_call_and_leave_nothing_in_it(client: MIIClient) -> None:
    async def text_of(prompt: str, **options: Any) -> str:
        text = ""
        async for pieces in client.astream(prompt, **{"max_new_tokens": 30, **options}):
            text += "".join(piece.generated_text for piece in pieces)
        return text

    async def main() -> None:
        before = asyncio.all_tasks()
        for _ in range(2):  # the second time finds that nothing is left of the first
            prompts = [f"prompt-{number}" for number in range(60)]
            texts = await asyncio.gather(*map(text_of, prompts))
            assert texts == [stand_in_text(prompt, 30) for prompt in prompts]
            await only(before)
        long = client.astream("long", max_new_tokens=LONG)
        await anext(long)
        with pytest.raises(RequestTimeoutError, match=r"timeout=0\.05 s"):
            await text_of("late", timeout=0.05, max_new_tokens=LONG)
        assert await text_of("another") == stand_in_text("another", 30)
        with pytest.raises(RequestError, match="top_p"):
            await text_of("wrong", top_p=7)
        assert await anext(long)
        await long.aclose()
        await only(before)

    asyncio.run(main())


@pytest.mark.parametrize(
    "prompts",
    [
        "one",
        ["one"],
        [5, 6, 7],
        [[5, 6, 7], [8]],
        ["one", [5, 6], "two", [7]],
        numpy.array([5, 6, 7]),
        numpy.array([[5, 6], [7, 8]]),
        (prompt for prompt in ("one", "two")),
        [],
    ],
    ids=lambda prompts: "generator" if isinstance(prompts, Iterator) else repr(prompts),
)
def test_prompts_are_what_the_pipeline_takes(client: MIIClient, said: Any, prompts: Any) -> None:
    given = list(prompts) if not isinstance(prompts, str) else [prompts]
    if given and isinstance(given[0], (int, numpy.integer)):
        given = [given]
    given = [prompt if isinstance(prompt, str) else [int(token) for token in prompt] for prompt in given]
    responses = client.generate(iter(given) if hasattr(prompts, "send") else prompts, max_new_tokens=4)
    assert [response.generated_text for response in responses or ()] == [said(prompt, 4) for prompt in given]


def test_options_may_be_lists_none_and_numpy_scalars(client: MIIClient, said: Any) -> None:
    text = said("one", 40)
    (response,) = (
        client.generate(
            "one", max_new_tokens=numpy.int64(40), top_p=numpy.float32(0.5), top_k=None, stop=[text[10:13], text[6:9]]
        )
        or ()
    )
    assert response.generated_text == text[:6] and response.finish_reason == "stop"


def test_a_callback_gets_one_piece_at_a_time_and_last_the_reason_without_text(client: MIIClient) -> None:
    got: list[StreamedResponse] = []
    client.generate("one", streaming_fn=lambda pieces: got.extend(pieces), max_new_tokens=20)
    *pieces, last = got
    assert all(piece.finish_reason == "none" and piece.generated_text for piece in pieces)
    lengths = [piece.generated_length for piece in pieces]
    assert lengths == sorted(set(lengths)) and lengths[-1] == 20
    assert (last.generated_text, last.finish_reason, last.generated_length) == ("", "length", 20)
    assert {piece.prompt_length for piece in got} == {last.prompt_length}


def test_threads_share_a_client(client: MIIClient, said: Any) -> None:
    def ask(number: int) -> bool:
        prompt = f"number {number}"
        streamed = "".join(
            piece.generated_text for pieces in client.stream(prompt, max_new_tokens=9) for piece in pieces
        )
        (response,) = client.generate(prompt, max_new_tokens=9) or ()
        return response.generated_text == streamed == said(prompt, 9)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(64)))


def test_a_synchronous_call_works_inside_a_running_event_loop(client: MIIClient, said: Any) -> None:
    async def notebook_cell() -> Any:
        return client.generate("one", max_new_tokens=5)

    (response,) = asyncio.run(notebook_cell())
    assert response.generated_text == said("one", 5)


def test_event_loops_come_and_go_and_leave_nothing(cluster: Cluster) -> None:
    async def run() -> None:
        async with MIIClient(cluster.config) as client:
            await asyncio.gather(*(client.generate_async("one", max_new_tokens=2) for _ in range(4)))

    asyncio.run(run())
    before = open_files()
    for _ in range(20):
        asyncio.run(run())
    wait_until(lambda: open_files() <= before + 2, seen=open_files)


def test_a_client_for_every_request_in_threads_with_loops_as_benchmarks_do(cluster: Cluster, said: Any) -> None:
    def worker(number: int) -> list[str]:
        asyncio.set_event_loop(asyncio.new_event_loop())
        texts = []
        for request in range(5):
            pieces: list[str] = []
            client = mii.client(NAME)
            client.generate(
                f"{number} {request}",
                max_new_tokens=5,
                streaming_fn=lambda response, pieces=pieces: pieces.append(response[0].generated_text),
            )
            texts.append("".join(pieces))
        asyncio.get_event_loop().close()
        return texts

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(worker, range(4)))
    assert results == [[said(f"{number} {request}", 5) for request in range(5)] for number in range(4)]
    before = open_files()
    for _ in range(300):
        MIIClient(cluster.config).health()
    wait_until(lambda: open_files() <= before + 1, seen=open_files)


def test_a_forked_process_makes_its_own_connection(client: MIIClient, said: Any) -> None:
    expected = said("one", 3)

    def works() -> bool:
        (response,) = client.generate("one", max_new_tokens=3) or ()
        streamed = [piece.generated_text for pieces in client.stream("one", max_new_tokens=3) for piece in pieces]
        return bool(response.generated_text == "".join(streamed) == expected)

    def refuses_what_grpc_cannot() -> bool:
        with pytest.raises(ServingError, match="forked from one that had made asynchronous calls"):
            asyncio.run(client.generate_async("one", max_new_tokens=3))
        return True

    assert works() and asyncio.run(client.generate_async("one", max_new_tokens=3))
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(0 if works() and refuses_what_grpc_cannot() and works() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert works() and asyncio.run(client.generate_async("one", max_new_tokens=3))
