"""A replica that stands still, and callers that do: the load balancer gives up the one and waits for the others."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from mii.backend import MIIClient
from mii.grpc_related import links
from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import CHANNEL_OPTIONS
from mii.grpc_related.proto.modelresponse_pb2 import MultiGenerationReply, SingleGenerationReply
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub
from tests.serving.clusters import Cluster, shared_cluster
from tests.serving.deployments import wait_until
from tests.serving.scripted import Scripted, balancing, scripted
from tests.serving.standin import Options

READERS, TOKENS = 64, 3000


class Cable:
    """Passes bytes between whoever connects and a port, until it is frozen: then nothing moves and nothing closes.

    Args:
        port: of this machine.
    """

    def __init__(self, port: int) -> None:
        self._target, self._moving = port, threading.Event()
        self._moving.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._moving.clear()

    def thaw(self) -> None:
        self._moving.set()

    def close(self) -> None:
        self.thaw()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here = self._listener.accept()[0]
                there = socket.create_connection(("127.0.0.1", self._target))
                self._open += [here, there]
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._moving.wait()
                sink.sendall(data)
            self._moving.wait()
            sink.shutdown(socket.SHUT_WR)


def test_a_replica_that_stands_still_is_given_up_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"grpc.keepalive_time_ms": 500, "grpc.keepalive_timeout_ms": 1500, "grpc.http2.ping_timeout_ms": 1500}
    monkeypatch.setattr(links, "_OPTIONS", links._OPTIONS | quick)
    replicas = [Scripted(), Scripted()]
    patient = [("grpc.http2.min_ping_interval_without_data_ms", 10)]
    with scripted(replicas[0], options=patient) as one, scripted(replicas[1], options=patient) as two:
        cable = Cable(one)
        with (
            balancing([cable.address, f"127.0.0.1:{two}"]) as balancer,
            grpc.insecure_channel(balancer.address) as channel,
        ):
            stub = ModelResponseStub(channel)
            wait_until(lambda: [replica.ready for replica in stub.Health(Empty()).replicas] == [True, True])
            cable.freeze()
            with ThreadPoolExecutor(8) as pool:
                call = stub.GeneratorReply
                answers = [pool.submit(call, pack_request([f"{number}"], {}), timeout=10) for number in range(8)]
                texts = [answer.result().response[0].response for answer in answers]
            assert texts == [f"{number}" for number in range(8)]
            wait_until(lambda: not stub.Health(Empty()).replicas[0].ready)
            cable.thaw()
            wait_until(lambda: stub.Health(Empty()).replicas[0].ready)
        cable.close()


def test_callers_who_do_not_read_are_given_up_and_told_so_when_they_read_on() -> None:
    replica, over = Scripted(), threading.Semaphore(0)

    def endless(request: Any, context: Any, call: int) -> Iterator[Any]:
        context.add_callback(over.release)
        while context.is_active():
            time.sleep(0.002)
            yield MultiGenerationReply(response=[SingleGenerationReply(response="x" * 10_000, finish_reason="none")])

    replica.script = endless
    with (
        scripted(replica) as port,
        balancing([f"127.0.0.1:{port}"], stall_seconds=0.4) as balancer,
        grpc.insecure_channel(balancer.address, CHANNEL_OPTIONS) as channel,
    ):
        stub = ModelResponseStub(channel)
        counts = lambda: json.loads(stub.Stats(Empty()).json)["balancer"]  # noqa: E731
        streams = [stub.GeneratorReplyStream(pack_request(["x"], {}), timeout=60) for _ in range(8)]
        for stream in streams:
            next(stream)
        for _ in streams:
            assert over.acquire(timeout=60)
        wait_until(lambda: counts()["outstanding"] == 0)
        for stream in streams:
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
            assert caught.value.details() == "the reader of this stream took nothing for 0.4 s"
        wait_until(lambda: counts()["calls"] == {"CANCELLED": len(streams)})


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = Options(step_seconds=0.001, max_length=1 << 20, num_blocks=1 << 20)
    with shared_cluster(tmp_path_factory, tiny_llama, options=options) as cluster:
        yield cluster


def test_a_part_that_fails_while_another_is_written_ends_the_call(cluster: Cluster) -> None:
    """One prompt is wrong and goes to one replica; the other replica's pieces are on their way at that moment."""
    until, longest = time.monotonic() + 3.0, []

    def ask() -> int:
        count = 0
        while time.monotonic() < until:
            for call in (cluster.client.generate, lambda prompts: list(cluster.client.stream(prompts))):
                began = time.monotonic()
                with pytest.raises(ValueError, match="9999"):
                    call(["one", [9999]])
                longest.append(time.monotonic() - began)
                count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        assert all(each.result(30) for each in asking)
    assert max(longest) < 10
    cluster.wait_idle()


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_readers_who_do_not_read_hold_up_nobody_and_make_nothing_grow(cluster: Cluster) -> None:
    pid = int(cluster.role("balancer").pid)
    own = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(cluster.address, own) as channel, MIIClient(cluster.config) as client:
        stub = ModelResponseStub(channel)

        def open_streams(count: int) -> list[Any]:
            request = pack_request(["one"], {"max_new_tokens": TOKENS})
            streams = [stub.GeneratorReplyStream(request) for _ in range(count)]
            for stream in streams:
                next(stream)
            return streams

        for stream in open_streams(READERS):
            stream.cancel()
        cluster.wait_idle()
        before = resident(pid)
        streams = open_streams(READERS)
        started = time.monotonic()
        assert client.generate("two", max_new_tokens=10)
        assert time.monotonic() - started < 10  # those who do not read never go on
        counts = lambda: [replica["engine"]["running"] for replica in client.stats()["replicas"]]  # noqa: E731
        wait_until(lambda: counts() == [0, 0], 120, seen=counts)  # the engines are done, and nobody has read
        assert resident(pid) - before < 32 << 20
        for stream in streams:
            rest = list(stream)
            assert rest[-1].response[0].generated_tokens == TOKENS and len(rest) < TOKENS
    cluster.wait_idle()
