"""How calls of the client end, whoever ends them, and what is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc._channel
import pytest
from google.protobuf.empty_pb2 import Empty

import mii
from mii.backend import MIIClient, apart, channels
from mii.batching.data_classes import StreamedResponse
from mii.errors import (
    PromptEncodingError,
    PromptTooLongError,
    PromptTypeError,
    RequestError,
    RequestTimeoutError,
    ServingError,
)
from mii.grpc_related.convert import pack_request
from mii.modeling.tokenizers import load_tokenizer
from tests.serving.clusters import Cluster, shared_cluster
from tests.serving.deployments import wait_until
from tests.serving.standin import Options, answer

LONG = 100_000


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


# Ends of calls


def interrupt_soon(number: signal.Signals = signal.SIGINT) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()


def test_ctrl_c_ends_a_call_here_and_in_the_engine(cluster: Cluster, client: MIIClient) -> None:
    started = time.monotonic()
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        client.generate("one", max_new_tokens=LONG)
    assert time.monotonic() - started < 10  # of a hundred seconds and more
    cluster.wait_idle()
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        for _ in client.stream("one", max_new_tokens=LONG):
            pass
    cluster.wait_idle()
    assert client.generate("one", max_new_tokens=2)


INTERRUPTS = 60


@pytest.fixture
def swallowed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where a KeyboardInterrupt came in a destructor or a weak reference's callback: Python says so and goes on."""
    places: list[Any] = []
    otherwise = sys.unraisablehook

    def keep(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            places.append(getattr(unraisable.object, "__qualname__", repr(unraisable.object)))
        else:
            otherwise(unraisable)

    monkeypatch.setattr(sys, "unraisablehook", keep)
    return places


def test_interrupts_at_any_moment_leave_the_connection_usable(
    cluster: Cluster, client: MIIClient, said: Any, swallowed: list[Any]
) -> None:
    came = 0

    def interrupt(*_: Any) -> None:
        nonlocal came
        came += 1
        raise KeyboardInterrupt

    def ask_for_ever(attempt: int) -> bool:
        """Whether an interrupt was swallowed; one that was not leaves this."""
        while came <= attempt:
            for _ in client.stream(["one", "two", "three"], max_new_tokens=15):
                pass
            client.generate("one", max_new_tokens=2)
        return True

    before, lost = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for attempt in range(INTERRUPTS):
            signal.setitimer(signal.ITIMER_REAL, random.Random(attempt).uniform(0.001, 0.04))
            with contextlib.suppress(KeyboardInterrupt):
                lost += ask_for_ever(attempt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came == INTERRUPTS and lost == len(swallowed) < INTERRUPTS // 4, swallowed
    assert not [place for place in swallowed if "Rendezvous" in place], swallowed  # gRPC's lock may be taken for ever
    cluster.wait_idle()
    (response,) = client.generate("one", max_new_tokens=3) or ()
    assert response.generated_text == said("one", 3)
    wait_until(no_call_is_left)


def no_call_is_left() -> bool:
    """Whether no thread runs for a call of the main thread's."""
    codes = {apart._work.__code__, apart.Handle.end.__code__}
    tops = sys._current_frames().values()
    return not any(frame.f_code in codes for top in tops for frame, _ in traceback.walk_stack(top))


def test_the_main_thread_destroys_no_call(cluster: Cluster, client: MIIClient, monkeypatch: pytest.MonkeyPatch) -> None:
    call = grpc._channel._Rendezvous
    destroy, threads = call.__del__, []

    def record(self: Any) -> None:
        threads.append(threading.current_thread())
        destroy(self)

    monkeypatch.setattr(call, "__del__", record)
    client.generate("one", max_new_tokens=2)
    assert list(client.stream(["one", "two"], max_new_tokens=2))
    for ask in (client.generate, lambda *args, **kwargs: list(client.stream(*args, **kwargs))):
        with pytest.raises(RequestError):
            ask("one", top_p=2)
        with pytest.raises(RequestTimeoutError):
            ask("one", max_new_tokens=LONG, timeout=0.3)
        interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            ask("one", max_new_tokens=LONG)
    with contextlib.closing(client.stream("one", max_new_tokens=LONG)) as stream:
        next(stream)
    wait_until(lambda: len(threads) == 9)
    gc.collect()
    assert len(threads) == 9 and threading.main_thread() not in threads, threads


def test_the_main_thread_waits_with_no_lock_that_an_interrupt_can_break(cluster: Cluster, client: MIIClient) -> None:
    waited = []

    def record(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is threading.Condition.wait.__code__:
            waited.append(frame.f_back)

    client.generate("one", max_new_tokens=2)
    sys.setprofile(record)
    try:
        client.generate("one", max_new_tokens=2)
        with contextlib.closing(client.stream("one", max_new_tokens=LONG)) as stream:
            next(stream)
    finally:
        sys.setprofile(None)
    assert waited == []


def test_a_stream_that_is_closed_ends_in_the_engine(cluster: Cluster, client: MIIClient) -> None:
    stream = client.stream("one", max_new_tokens=LONG)
    next(stream)
    stream.close()
    cluster.wait_idle()


def test_an_error_in_a_callback_ends_the_call(cluster: Cluster, client: MIIClient) -> None:
    def callback(pieces: list[StreamedResponse]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.generate("one", callback, max_new_tokens=LONG)
    cluster.wait_idle()


def test_a_cancelled_task_ends_its_call(cluster: Cluster, client: MIIClient) -> None:
    async def run() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.generate_async("one", max_new_tokens=LONG), 0.3)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.generate_async("one", lambda _: None, max_new_tokens=LONG), 0.3)

    asyncio.run(run())
    cluster.wait_idle()


def test_time_that_is_over_ends_a_call_everywhere(cluster: Cluster, client: MIIClient) -> None:
    with pytest.raises(RequestTimeoutError, match=r"not complete within timeout=1 s") as caught:
        client.generate("one", max_new_tokens=LONG, timeout=1)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    cluster.wait_idle()
    with pytest.raises(TimeoutError):
        list(client.stream("one", max_new_tokens=LONG, timeout=0.3))
    with MIIClient(cluster.config, timeout=0.3) as impatient, pytest.raises(TimeoutError):
        impatient.generate("one", max_new_tokens=LONG)
    wrong: Any
    for wrong in (0, -1, "soon"):
        with pytest.raises(ValueError, match=f"timeout is {wrong!r}; give a number of seconds above 0"):
            client.generate("one", timeout=wrong)


def test_a_callback_that_dawdles_gets_everything_in_fewer_pieces(client: MIIClient, said: Any) -> None:
    pieces: list[str] = []

    def callback(response: list[StreamedResponse]) -> None:
        if len(pieces) == 1:
            time.sleep(1.5)
        pieces.append(response[0].generated_text)

    client.generate("one", callback, max_new_tokens=2500)
    assert "".join(pieces) == said("one", 2500)
    assert len(pieces) < 2000


# Errors


@pytest.mark.parametrize(
    ("prompts", "options", "kind", "message"),
    [
        ("one", {"top_p": 2}, RequestError, "top_p=2"),
        ("one", {"no_such_option": 1}, RequestError, "unknown option 'no_such_option'"),
        ("one", {"stop": b"x"}, RequestError, "cannot be sent"),
        (5, {}, PromptTypeError, "prompts is int 5"),
        (["one", "\ud83d"], {}, PromptEncodingError, "half of a surrogate pair"),
        ([5] * (2 * LONG + 1), {}, PromptTooLongError, "leaves no room for an answer"),
        (["one", [9999]], {}, RequestError, "prompt 1.*token id 9999"),
    ],
)
def test_what_the_caller_did_wrong_is_told_at_once(
    client: MIIClient, prompts: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    for call in (client.generate, lambda *args, **kwargs: list(client.stream(*args, **kwargs))):
        with pytest.raises(kind, match=message) as caught:
            call(prompts, **options)
        assert isinstance(caught.value, ValueError)
        again = pickle.loads(pickle.dumps(caught.value))
        assert type(again) is type(caught.value) and str(again) == str(caught.value)


def test_errors_of_the_server_are_also_grpcs(client: MIIClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.generate("one", top_p=2)
    assert isinstance(caught.value, RequestError)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == str(caught.value)


# The deployment


def test_it_says_how_it_is(client: MIIClient) -> None:
    client.wait_ready(60)
    health = client.health()
    assert health == asyncio.run(client.health_async())
    assert health["ready"] and not health["reason"]
    assert [replica["ready"] for replica in health["replicas"]] == [True, True]
    assert {replica["max_length"] for replica in health["replicas"]} == {2 * LONG}
    stats = client.stats()
    assert stats["balancer"]["replicas_ready"] == 2 and len(stats["replicas"]) == 2


def test_a_request_can_have_a_name(cluster: Cluster, client: MIIClient) -> None:
    assert client.generate("one", max_new_tokens=2, request_id="my-own-name")


def test_a_closed_client_says_so_and_others_go_on(cluster: Cluster) -> None:
    one, other = MIIClient(cluster.config), MIIClient(cluster.config)
    assert one.generate("one", max_new_tokens=2)
    one.close()
    one.close()
    with pytest.raises(ServingError, match=r"is closed; make another one with mii\.client"):
        one.generate("one")
    assert other.generate("one", max_new_tokens=2)
    other.close()


def settled_files() -> int:
    """`open_files()` once it stays: what earlier tests left is closed a moment later, and must not be in between."""
    gc.collect()
    seen = [open_files()]
    while len(seen) < 6 or len(set(seen[-6:])) > 1:
        assert len(seen) < 600, seen
        time.sleep(0.1)
        seen.append(open_files())
    return seen[-1]


def test_the_last_client_that_closes_takes_the_connection_along(shared: Cluster) -> None:
    shared.client.close()
    before = settled_files()
    with MIIClient(shared.config) as client:
        assert client.generate("one", max_new_tokens=2)
        assert open_files() > before
    wait_until(lambda: open_files() <= before, seen=open_files)
    shared.client = MIIClient(shared.config)


def test_its_attributes_are_those_of_deepspeed_miis(client: MIIClient, cluster: Cluster) -> None:
    assert client.mii_config is cluster.config and client.port == cluster.config.port_number
    assert client.task == "text-generation"
    asyncio.run(asyncio.sleep(0))  # which leaves this thread without an event loop
    loop = client.asyncio_loop
    assert client.asyncio_loop is loop and not loop.is_running()
    request = pack_request(["DeepSpeed is"], {"max_new_tokens": 8})
    said = loop.run_until_complete(client.stub.GeneratorReply(request, timeout=20))
    (response,) = client("DeepSpeed is", max_new_tokens=8) or ()
    assert said.response[0].response == response.generated_text

    async def within() -> None:
        assert client.asyncio_loop is asyncio.get_running_loop()
        assert (await client.stub.Health(Empty(), timeout=20)).ready
        client.close()

    asyncio.run(within())
    assert loop.is_closed()

    with pytest.raises(ServingError, match="closed"):
        client.stub  # noqa: B018


@pytest.mark.parametrize(
    ("host", "listens", "address"),
    [
        ("localhost", "127.0.0.1", "127.0.0.1:7"),
        ("localhost", "0.0.0.0", "127.0.0.1:7"),
        ("localhost", "10.0.0.5", "10.0.0.5:7"),
        ("gpu-3", "0.0.0.0", "gpu-3:7"),
        ("fe80::1", "::", "[fe80::1]:7"),
    ],
)
def test_it_finds_the_address(host: str, listens: str, address: str) -> None:
    config = mii.config.MIIConfig(model_config={"model_name_or_path": "m"}, host=listens, port_number=7)
    client = MIIClient(config, host)
    assert client.address == address
    client.close()
    assert address not in channels._connections.users
