"""Which TCP ports are free, who has those that are not, and the ports of a new deployment."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from mii.config import MIIConfig, ReplicaConfig
from mii.config.placement import Placement, check_ports, make_replica_configs, move_unasked_ports
from mii.errors import PlacementError, PortTakenError

__all__ = ["PortClaims", "add_replicas", "choose_ports", "is_free", "port_owner", "ports_of"]

_LAST_PORT = 65535
_LISTEN = "0A"  # state of a socket in /proc/net/tcp


class PortClaims:
    """Ports that this process has chosen for others, which do not listen yet: nobody else on this machine chooses them.

    A claim is an abstract Unix socket that is named after its port, so it ends with the process, however that ends.
    With it the port itself is bound, but not listened on: the system gives it to no outgoing connection then, while a
    server, which sets SO_REUSEADDR, can listen there. On systems other than Linux nothing is claimed, and where servers
    are kept out of such a port it is not bound.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[socket.socket]] = {}

    def take(self, port: int) -> bool:
        """Claims a port; False: somebody else has."""
        if port in self._held or not sys.platform.startswith("linux"):
            return True
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0mii-port-{port}")
        except OSError:
            claim.close()
            return False
        self._held[port] = [claim]
        return True

    def hold(self, port: int, host: str) -> bool:
        """Binds a claimed port of `host`; False: somebody who never claimed it has it.

        Raises:
            PlacementError: `host` is no address of this machine.
        """
        bound = _bind(port, host)
        if port in self._held and _servers_come_in():
            self._held[port] += bound
        else:
            _close(bound)
        return bool(bound)

    def drop(self, port: int) -> None:
        """Gives a port up."""
        _close(self._held.pop(port, []))

    def release(self) -> None:
        """Gives all up: their owners listen by now, or never will."""
        for port in list(self._held):
            self.drop(port)


def choose_ports(config: MIIConfig, reserved: Collection[int] = (), claims: PortClaims | None = None) -> MIIConfig:
    """A copy of `config` with ports that are free on this machine.

    Ports that were not asked for move up to the next free ones, the replicas' together with the load balancer's where
    they can. Fills `replica_configs`.

    Args:
        config: of the deployment.
        reserved: ports of other deployments, which may be starting and not listen yet.
        claims: gets what is chosen; release it once the deployment listens. Released where this raises.

    Raises:
        PortTakenError: a port that was asked for is taken.
        PlacementError, HostfileError: see `MIIConfig.generate_replica_configs`.
    """
    try:
        return _with_free_ports(config.model_copy(deep=True), _Free(reserved, claims))
    except BaseException:
        if claims is not None:
            claims.release()
        raise


def _with_free_ports(config: MIIConfig, free: _Free) -> MIIConfig:
    asked_replicas = bool(config.model_conf.replica_configs)
    if "port_number" in config.model_fields_set:
        free.demand(config.port_number, "port_number", config.host)
    else:
        config.__dict__["port_number"] = _first_block(config, free)
    config.generate_replica_configs()
    used = {config.port_number}
    for index, replica in enumerate(config.model_conf.replica_configs):
        _check_replica(replica, index, config.model_conf.tensor_parallel)
        if replica.is_local and not config.replica_only:
            _settle_replica(replica, index, asked_replicas, free, used)
    if config.enable_restful_api:
        if "restful_api_port" in config.model_fields_set:
            free.demand(config.restful_api_port, "restful_api_port", config.restful_api_host)
        else:
            config.__dict__["restful_api_port"] = free.next(config.restful_api_port, used, config.restful_api_host)
    check_ports({name: [port] for name, port in _named(config).items()}, config.model_conf.replica_configs)
    return config


def add_replicas(
    config: MIIConfig, placements: Sequence[Placement], reserved: Collection[int], claims: PortClaims | None = None
) -> list[ReplicaConfig]:
    """The replicas of a deployment that runs, and more of them on ports that are free.

    Args:
        config: of the deployment.
        placements: where the new ones run.
        reserved: ports that start to be used, the deployment's own among them.
        claims: gets what is chosen; release it once they listen.

    Raises:
        PlacementError: there are no ports for them.
    """
    model = config.model_conf
    before = model.replica_configs
    nowhere = [Placement("localhost", ())] * len(before)
    added = make_replica_configs(model, config.port_number, [*nowhere, *placements])[len(before) :]
    free, used = _Free(reserved, claims), set(ports_of(config))
    used.update(port for replica in before if replica.is_local for port in replica.inner_ports)
    for index, replica in enumerate(added, start=len(before)):
        if replica.is_local:
            _settle_replica(replica, index, False, free, used)
    replicas = [*before, *added]
    named = {name: [port] for name, port in _named(config).items()}
    move_unasked_ports(model, named, added, running=before)
    check_ports(named, replicas)
    return replicas


def ports_of(config: MIIConfig) -> list[int]:
    """Every port that the deployment listens on at this machine."""
    replicas = [replica for replica in config.model_conf.replica_configs if replica.is_local]
    return [*_named(config).values(), *(port for replica in replicas for port in replica.tensor_parallel_ports)]


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on `port` of `host` now.

    Raises:
        PlacementError: `host` is no address of this machine.
    """
    bound = _bind(port, host)
    _close(bound)
    return bool(bound)


def port_owner(port: int) -> str:
    """``"process 123 (python server.py)"`` for who listens on `port`; empty where it cannot be told."""
    inodes = set(_listening_inodes(port))
    if not inodes:
        return ""
    links = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        if any(link in links for link in _open_files(process)):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            return f"process {process.name} ({command[:80]})"
    return ""


class _Free:
    """Looks for free ports, and keeps in mind those of other deployments."""

    def __init__(self, reserved: Collection[int], claims: PortClaims | None = None) -> None:
        self._reserved, self._claims = reserved, claims

    def has(self, port: int, host: str) -> bool:
        if self._is_theirs(port):
            return False
        if self._binds(port, host):
            return True
        if self._claims is not None:
            self._claims.drop(port)
        return False

    def demand(self, port: int, option: str, host: str) -> None:
        if self._is_theirs(port):
            raise PortTakenError(
                f"port {port} ({option}) belongs to another deployment of mii; choose another one, or leave {option} "
                "out for the next free one"
            )
        if not self._binds(port, host):
            owner = port_owner(port)
            by = f" by {owner}" if owner else ""
            raise PortTakenError(
                f"port {port} ({option}) is taken{by}; choose another one, or leave {option} out for the next free one"
            )

    def next(self, first: int, used: Collection[int], host: str) -> int:
        for port in range(first, _LAST_PORT + 1):
            if port not in used and self.has(port, host):
                return port
        raise PlacementError(f"no port from {first} up is free on this machine")

    def _is_theirs(self, port: int) -> bool:
        """Whether it belongs to another deployment; claims it if not."""
        return port in self._reserved or (self._claims is not None and not self._claims.take(port))

    def _binds(self, port: int, host: str) -> bool:
        """Whether nobody listens there; binds it if it is claimed."""
        return is_free(port, host) if self._claims is None else self._claims.hold(port, host)


def _first_block(config: MIIConfig, free: _Free) -> int:
    """The first port from the default up after which each replica's are free too."""
    count = 1 + config.model_conf.replica_num * config.model_conf.tensor_parallel
    for first in range(config.port_number, _LAST_PORT + 2 - count):
        others = range(first + 1, first + count)
        if free.has(first, config.host) and all(free.has(port, "127.0.0.1") for port in others):
            return first
    raise PlacementError(f"no {count} ports in a row from {config.port_number} up are free on this machine")


def _settle_replica(replica: ReplicaConfig, index: int, asked: bool, free: _Free, used: set[int]) -> None:
    if asked:
        for port in replica.tensor_parallel_ports:
            free.demand(port, f"tensor_parallel_ports of replica {index}", "127.0.0.1")
    else:
        ports: list[int] = []
        for port in replica.tensor_parallel_ports:
            ports.append(free.next(port, {*used, *ports}, "127.0.0.1"))
        replica.tensor_parallel_ports = ports
    used.update(replica.tensor_parallel_ports)


def _check_replica(replica: ReplicaConfig, index: int, tensor_parallel: int) -> None:
    for name in ("tensor_parallel_ports", "gpu_indices"):
        count = len(getattr(replica, name))
        if count != tensor_parallel:
            raise PlacementError(
                f"replica_configs[{index}].{name} has {count} entries and tensor_parallel is {tensor_parallel}; give "
                "one for each process, or leave replica_configs out"
            )
    hosts = replica.rank_hosts
    if hosts and (len(hosts) != tensor_parallel or hosts[0] != replica.hostname):
        raise PlacementError(
            f"replica_configs[{index}].rank_hosts is {hosts}; give {tensor_parallel} hosts, of which the first is "
            f"hostname ({replica.hostname!r}), or leave it out"
        )


def _named(config: MIIConfig) -> dict[str, int]:
    named = {} if config.replica_only else {"port_number": config.port_number}
    if config.enable_restful_api:
        named["restful_api_port"] = config.restful_api_port
    return named


def _bind(port: int, host: str) -> list[socket.socket]:
    """Sockets bound to `port` of each address of `host`, none of which listens; empty: somebody has it.

    Raises:
        PlacementError: `host` is no address of this machine.
    """
    bound: list[socket.socket] = []
    for family, address in _addresses(host, port):
        probe = socket.socket(family, socket.SOCK_STREAM)
        bound.append(probe)
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given back is free
            probe.bind(address)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                _close(bound)
                return []
            bound.pop().close()
    if not bound:
        raise PlacementError(f"nothing can listen on {host!r}: it is no address of this machine")
    return bound


@cache
def _servers_come_in() -> bool:
    """Whether this system lets a server listen on a port that another socket is bound to, as Linux does where both set
    SO_REUSEADDR and the other one does not listen.
    """
    with socket.socket() as holder, socket.socket() as server:
        try:
            for each in (holder, server):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            server.bind(holder.getsockname())
            server.listen()
        except OSError:
            return False
    return True


def _close(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()


def _addresses(host: str, port: int) -> Iterator[tuple[socket.AddressFamily, tuple[object, ...]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise PlacementError(f"{host!r} is no address that a server can listen on: {error.strerror}") from error
    for family, _, _, _, address in found:
        if family != socket.AF_INET6 or socket.has_ipv6:
            yield family, address


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == _LISTEN:
                yield fields[9]


def _open_files(process: Path) -> Iterator[str]:
    try:
        links = list((process / "fd").iterdir())
    except OSError:  # another user's, or gone
        return
    for link in links:
        with suppress(OSError):  # closed since
            yield str(link.readlink())
