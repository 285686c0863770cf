"""Random bytes, half-spoken protocols and peers that say nothing, at every port and socket of a deployment."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from mii.config.registry import deployment_folder
from mii.launch.state import read_state
from tests.serving.clusters import NAME, Cluster, shared_cluster
from tests.serving.crowd import crowd, http_options
from tests.serving.deployments import wait_until
from tests.serving.standin import Options

ROLES = ("balancer", "gateway", "replica-0-front", "replica-0-engine")
ROUNDS, STAY = 60, 100
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CALL = b"POST /modelresponse.ModelResponse/GeneratorReply HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = Options(step_seconds=0.002)
    with shared_cluster(tmp_path_factory, tiny_llama, replicas=1, options=options, **http_options()) as running:
        yield running


def pids(cluster: Cluster) -> dict[str, int]:
    return {role: int(cluster.role(role).pid) for role in ROLES}


def descriptors(cluster: Cluster) -> dict[str, int]:
    return {role: len(list(Path(f"/proc/{pid}/fd").iterdir())) for role, pid in pids(cluster).items()}


def addresses() -> dict[str, tuple[str, int] | str]:
    """Every port and unix socket that the deployment listens on."""
    folder = deployment_folder(NAME)
    state = read_state(folder.state_file)
    assert state is not None
    ports = [(process.role, port) for process in state.processes for port in process.ports.values()]
    found: dict[str, tuple[str, int] | str] = {f"{role}:{port}": ("127.0.0.1", port) for role, port in ports}
    sockets = {path.name: str(path) for path in folder.run.glob("*.sock")}
    assert {"engine-0.sock", "calls.sock", "control.sock"} <= sockets.keys() and len(ports) >= 3
    found |= sockets
    return found


def noises(rng: random.Random) -> Iterator[list[bytes]]:
    """What peers say: pieces that are sent one after the other."""
    frame = struct.pack(">I", rng.randrange(1 << 24))[1:] + rng.randbytes(6)
    yield [rng.randbytes(rng.randrange(1, 5000))]
    yield [HTTP2, rng.randbytes(rng.randrange(1, 2000))]
    yield [HTTP2, b"\0\0\0\4\0\0\0\0\0", frame, rng.randbytes(rng.randrange(1, 2000))]
    yield [b"GET / HTTP/1.1\r\n", b"X: " + b"y" * 200_000]
    yield [CALL, rng.randbytes(100)]
    yield [b"POST /mii/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"zz\r\n" + rng.randbytes(50)]
    yield [b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 48, rng.randbytes(rng.randrange(1, 300))]  # ZeroMQ's greeting
    yield [b"\x16\3\1\2\0\1\0\1\xfc\3\3" + rng.randbytes(500)]  # a TLS hello
    yield []


def connect(address: tuple[str, int] | str) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    peer = socket.socket(family)
    peer.settimeout(30)
    peer.connect(address)
    return peer


def say(address: tuple[str, int] | str, pieces: list[bytes], rng: random.Random) -> socket.socket:
    """Says it, and in one of the ways that peers have: reads the answer, resets the connection, just leaves, or stays.

    Returns the connection, which is open where it stays.
    """
    peer, how = connect(address), rng.choice(("reads", "resets", "leaves", "stays"))
    with contextlib.suppress(OSError):  # the other side may hang up whenever it likes
        for piece in pieces:
            peer.sendall(piece)
        if how == "reads":
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass
        elif how == "resets":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how != "stays":
        peer.close()
    return peer


def shout(address: tuple[str, int] | str, seed: int) -> None:
    """Says everything, many times; those who stay leave after some rounds."""
    rng, here = random.Random(seed), list[socket.socket]()
    for _ in range(ROUNDS):
        here += [say(address, pieces, rng) for pieces in noises(rng)]
        while len(here) > STAY:
            here.pop(0).close()
    for peer in here:
        peer.close()


def test_noise_at_every_port_harms_nobody(cluster: Cluster) -> None:
    with crowd(cluster.config, 8, 20) as clients:  # connections that stay are made
        wait_until(lambda: len(clients.outcomes) >= 16)
    cluster.wait_idle()
    before, held = pids(cluster), descriptors(cluster)
    with crowd(cluster.config, 8, 20) as clients:
        wait_until(lambda: len(clients.outcomes) >= 16)
        silent = [connect(address) for address in addresses().values() for _ in range(20)]
        threads = [
            threading.Thread(target=shout, args=(address, seed)) for seed, address in enumerate(addresses().values())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a port took a connection, and then nothing of what was said"
        heard = len(clients.outcomes)
        wait_until(lambda: len(clients.outcomes) > heard + 16, seen=lambda: clients.outcomes[heard:])
        for peer in silent:
            peer.close()
    assert [outcome for outcome in clients.outcomes if not outcome.good] == []
    assert pids(cluster) == before, "a process was started again"
    wait_until(
        lambda: all(now <= held[role] for role, now in descriptors(cluster).items()),
        seen=lambda: (held, descriptors(cluster)),
    )
    cluster.wait_idle()


def test_an_intruder_at_the_engines_socket_cannot_end_it(cluster: Cluster) -> None:
    """It needs this user's rights; what it says is no message, and the front is not lost."""
    before, rng = pids(cluster), random.Random(3)
    with zmq.Context() as context, context.socket(zmq.DEALER) as intruder:
        intruder.linger = 0
        intruder.connect(deployment_folder(NAME).engine_address(0))
        noise = [[rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(1, 4))] for _ in range(200)]
        for parts in ([b"\x81\xa4type\xa3\xff\xfe\xfd"], [b""], [b"\x91" * 5000], *noise):
            intruder.send_multipart(parts)
        with crowd(cluster.config, 4, 20) as clients:
            wait_until(lambda: sum(outcome.good for outcome in clients.outcomes) >= 8)
    assert pids(cluster) == before
    cluster.wait_idle()
