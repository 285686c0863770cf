"""Runs an app: listens, serves, and ends when it is told to, letting what runs finish first."""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from mii.entrypoints.http.streaming import BODY_SEND
from mii.errors import PortTakenError

__all__ = ["STALL_SECONDS", "HttpServer", "TlsFiles", "listen", "tls_from_environment"]

CERTFILE_ENV, KEYFILE_ENV = "SSL_CERTFILE", "SSL_KEYFILE"
STALL_SECONDS = 120
"""A client that takes nothing of what is sent to it for so long is given up."""
_KEEP_ALIVE_SECONDS = 300  # as DeepSpeed-MII has it
_BACKLOG = 2048
_PASSIVE = socket.AI_PASSIVE


@dataclass(frozen=True)
class TlsFiles:
    """Where a server's certificate and its private key lie, in PEM form."""

    certificate: str
    key: str


class HttpServer:
    """One app on some sockets.

    Args:
        app: what answers.
        sockets: that it listens on, see `listen`. They are closed at the end.
        tls: None: plain HTTP.
        drain_seconds: how long requests that run may still take at the end.
    """

    def __init__(
        self, app: ASGIApp, sockets: Sequence[socket.socket], *, tls: TlsFiles | None = None, drain_seconds: float
    ) -> None:
        self._sockets = list(sockets)
        files: dict[str, Any] = {} if tls is None else {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
        config = uvicorn.Config(
            _with_short_way(app),
            access_log=False,
            log_config=None,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(drain_seconds),
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            ws="none",
            **files,
        )
        self._server = _Server(config)

    @property
    def started(self) -> bool:
        """Whether it answers."""
        return self._server.started

    async def serve(self) -> None:
        """Answers until `stop`, and returns when what ran has ended or was ended."""
        await self._server.serve(self._sockets)
        if self._server.force_exit:  # then uvicorn leaves the app as it is
            await self._server.lifespan.shutdown()

    def stop(self) -> None:
        """Takes no new connections and ends. Called again, it does not wait for what runs."""
        self._server.force_exit = self._server.should_exit
        self._server.should_exit = True


def _with_short_way(app: ASGIApp) -> ASGIApp:
    """The same, with the server's own `send` where bodies look for it: what lies around the app only needs heads."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope[BODY_SEND] = send
        await app(scope, receive, send)

    return call


class _Server(uvicorn.Server):
    """Signals are its caller's affair."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Sockets on every address that a host name stands for.

    Args:
        host: a name or an address; "0.0.0.0" and "::" are every one of the machine.
        port: 0 takes any that is free.
        shared: others may listen there too, if they share it as well: the kernel spreads connections among them.

    Raises:
        PortTakenError: the port is in use, or the host is none of this machine.
    """
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=_PASSIVE):
            with contextlib.ExitStack() as stack:
                listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if shared:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                _give_up_silent_clients(listener)
                if family == socket.AF_INET6:  # the other family has a socket of its own
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                bound = sockets[0].getsockname()[1] if sockets else port
                try:
                    listener.bind((address[0], bound, *address[2:]))
                except OSError as error:
                    if error.errno != errno.EADDRNOTAVAIL:  # a machine without IPv6 has names for it all the same
                        raise
                    continue
                listener.listen(_BACKLOG)
                listener.setblocking(False)
                stack.pop_all()
                sockets.append(listener)
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, f"{host!r} is no address of this machine")
    except OSError as error:
        for listener in sockets:
            listener.close()
        raise PortTakenError(f"port {port} of {host!r} cannot be listened on: {error.strerror or error}") from error
    return sockets


def _give_up_silent_clients(listener: socket.socket) -> None:
    """Makes the kernel close connections whose client is gone without a word, or reads nothing for long."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", STALL_SECONDS), ("TCP_USER_TIMEOUT", STALL_SECONDS * 1000)):
        if hasattr(socket, name):  # Linux; accepted sockets inherit it
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def tls_from_environment(environment: Mapping[str, str]) -> TlsFiles:
    """The files that ``SSL_CERTFILE`` and ``SSL_KEYFILE`` name, tried out.

    Raises:
        ValueError: one is not named, cannot be read, or they do not belong together.
    """
    missing = [name for name in (CERTFILE_ENV, KEYFILE_ENV) if not environment.get(name)]
    if missing:
        raise ValueError(f"TLS needs {' and '.join(missing)} in the environment: the file in PEM form")
    files = TlsFiles(environment[CERTFILE_ENV], environment[KEYFILE_ENV])
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"{files.certificate} and {files.key} are no certificate and key: {error}") from error
    return files
