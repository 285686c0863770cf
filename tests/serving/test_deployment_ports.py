"""Ports of a deployment: free, its own, and where they were not asked for, the next free ones."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import pytest

from mii.backend import ports as module
from mii.backend.ports import PortClaims, add_replicas, choose_ports, is_free, port_owner, ports_of
from mii.config import MIIConfig
from mii.config.placement import Placement
from mii.errors import PlacementError, PortTakenError


def config(model: dict[str, Any] | None = None, **options: Any) -> MIIConfig:
    return MIIConfig(model_config={"model_name_or_path": "m", "device": "cpu", **(model or {})}, **options)


@contextmanager
def listening(port: int = 0, host: str = "127.0.0.1", family: int = socket.AF_INET) -> Iterator[int]:
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen()
        yield server.getsockname()[1]


def free_block(count: int) -> int:
    """The first of `count` free ports in a row, away from those that other tests take and outgoing connections get."""
    return next(
        first for first in range(30000, 32000) if all(is_free(port, "0.0.0.0") for port in range(first, first + count))
    )


def untouched_port() -> int:
    """One that even a socket without SO_REUSEADDR can be bound to: no connection of it lingers. Away from those that
    other tests, in this process and in others, look for at the same time.
    """
    for port in range(31000 + os.getpid() % 500, 32000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
    raise AssertionError("no port is left")


def test_ports_follow_the_load_balancers() -> None:
    first = free_block(4)
    chosen = choose_ports(config({"replica_num": 3}, port_number=first))
    assert chosen.port_number == first
    assert [replica.tensor_parallel_ports for replica in chosen.model_conf.replica_configs] == [
        [first + 1],
        [first + 2],
        [first + 3],
    ]
    assert ports_of(chosen) == list(range(first, first + 4))


def test_the_config_that_was_given_stays_as_it_is() -> None:
    given = config({"replica_num": 2})
    choose_ports(given)
    assert given == config({"replica_num": 2})
    assert given.model_conf.replica_configs == []


def test_default_ports_move_together_past_those_that_are_taken() -> None:
    usual = choose_ports(config({"replica_num": 2}))
    first = usual.port_number
    with listening(first + 2):
        chosen = choose_ports(config({"replica_num": 2}))
    assert chosen.port_number > first + 2
    replicas = [replica.tensor_parallel_ports[0] for replica in chosen.model_conf.replica_configs]
    assert replicas == [chosen.port_number + 1, chosen.port_number + 2]


def test_ports_of_other_deployments_are_left_alone_before_they_listen() -> None:
    usual = choose_ports(config(enable_restful_api=True))
    chosen = choose_ports(config(enable_restful_api=True), ports_of(usual))
    assert not set(ports_of(chosen)) & set(ports_of(usual))
    with pytest.raises(PortTakenError, match=r"\(port_number\) belongs to another deployment of mii"):
        choose_ports(config(port_number=usual.port_number), ports_of(usual))


def test_a_replicas_port_that_nobody_asked_for_moves_up() -> None:
    first = free_block(4)
    with listening(first + 1):
        chosen = choose_ports(config({"replica_num": 2}, port_number=first))
    assert ports_of(chosen) == [first, first + 2, first + 3]


def test_replicas_that_come_later_leave_the_ports_that_have_moved_alone() -> None:
    first = free_block(6)
    given = config({"replica_num": 1}, port_number=first)
    given.model_conf.__dict__["zmq_port_number"] = first + 1  # a default that lies there
    chosen = choose_ports(given)
    assert chosen.model_conf.replica_configs[0].zmq_port == first + 2
    old, new = add_replicas(chosen, [Placement("localhost", (0,))], [])
    assert old == chosen.model_conf.replica_configs[0]
    assert new.tensor_parallel_ports == [first + 3]
    assert new.zmq_port == first + 4


@pytest.mark.parametrize("option", ["port_number", "restful_api_port"])
def test_a_port_that_was_asked_for_and_is_taken_is_named_with_its_owner(option: str) -> None:
    with (
        listening() as port,
        pytest.raises(PortTakenError, match=rf"port {port} \({option}\) is taken by process {os.getpid()} \("),
    ):
        choose_ports(config(enable_restful_api=True, **{option: port}))


def test_ports_of_replicas_that_were_asked_for_are_kept_or_refused() -> None:
    first = free_block(2)
    replica = {"hostname": "localhost", "tensor_parallel_ports": [first + 1], "gpu_indices": [0]}
    asked = config({"replica_configs": [replica]}, port_number=first)
    assert ports_of(choose_ports(asked)) == [first, first + 1]
    with listening(first + 1), pytest.raises(PortTakenError, match="tensor_parallel_ports of replica 0"):
        choose_ports(asked)


def test_replicas_without_their_ports_or_devices_are_refused() -> None:
    for name, ports, devices in (("tensor_parallel_ports", [], [0]), ("gpu_indices", [free_block(1)], [])):
        replica = {"hostname": "localhost", "tensor_parallel_ports": ports, "gpu_indices": devices}
        with pytest.raises(
            PlacementError, match=rf"replica_configs\[0\]\.{name} has 0 entries and tensor_parallel is 1"
        ):
            choose_ports(config({"replica_configs": [replica]}))


def test_a_port_that_was_just_given_back_is_free() -> None:
    with listening() as port:
        client = socket.create_connection(("127.0.0.1", port))
        assert not is_free(port)
        assert not is_free(port, "0.0.0.0")
    client.close()
    assert is_free(port)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_a_port_that_is_taken_for_all_addresses_of_both_kinds_is_not_free() -> None:
    try:
        with listening(0, "::", socket.AF_INET6) as port:
            assert not is_free(port)
            assert port_owner(port).startswith(f"process {os.getpid()} (")
    except OSError as error:
        pytest.skip(f"IPv6 cannot be used here: {error}")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.7", "localhost:80"])
def test_an_address_that_is_not_this_machines_is_refused(host: str) -> None:
    with pytest.raises(PlacementError, match="listen on"):
        choose_ports(config(host=host))


def test_a_port_that_nobody_has_has_no_owner() -> None:
    assert port_owner(free_block(1)) == ""


def test_two_that_start_at_the_same_time_choose_different_ports() -> None:
    """Nobody listens yet, and neither is in the other's registry."""
    mine, theirs = PortClaims(), PortClaims()
    first = choose_ports(config({"replica_num": 2}), claims=mine)
    second = choose_ports(config({"replica_num": 2}, enable_restful_api=True), claims=theirs)
    assert not set(ports_of(first)) & set(ports_of(second))
    with pytest.raises(PortTakenError, match="belongs to another deployment"):
        choose_ports(config(port_number=first.port_number), claims=PortClaims())
    mine.release()
    again = PortClaims()
    assert again.take(first.port_number)
    for claims in (again, theirs):
        claims.release()


@pytest.mark.skipif(not module._servers_come_in(), reason="no server may listen on a port that is bound here")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_chosen_port_goes_to_a_server_and_to_no_outgoing_connection(host: str) -> None:
    claims, port = PortClaims(), untouched_port()
    choose_ports(config(host=host, port_number=port), claims=claims)
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as client:
        with pytest.raises(OSError, match="in use"):
            client.bind(("127.0.0.1", port))  # as the system binds what connects, without SO_REUSEADDR
        server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
        assert server.add_insecure_port(f"{host}:{port}") == port
        server.start()
        claims.release()
        with socket.create_connection(("127.0.0.1", port)), pytest.raises(PortTakenError, match="taken by process"):
            choose_ports(config(host=host, port_number=port), claims=claims)
        server.stop(0).wait()
        claims.release()
        client.bind(("127.0.0.1", 0))
        client.connect(other.getsockname())


def test_no_port_is_bound_where_that_would_keep_its_server_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_servers_come_in", lambda: False)
    claims, port = PortClaims(), untouched_port()
    choose_ports(config(port_number=port), claims=claims)
    assert not PortClaims().take(port)
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))  # as any server could that sets nothing
    claims.release()


def test_a_port_that_a_connection_has_is_taken() -> None:
    port = untouched_port()
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as client:
        client.bind(("127.0.0.1", port))
        client.connect(other.getsockname())
        with pytest.raises(PortTakenError, match=f"port {port} .port_number. is taken"):
            choose_ports(config(port_number=port), claims=PortClaims())
