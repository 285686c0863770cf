"""Runs an HTTP server from the command line: over a deployment that is there, or over one that ends with it."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi import FastAPI

from mii.backend.channels import address_of
from mii.entrypoints.http.bodies import DEFAULT_BODY_BYTES
from mii.entrypoints.http.server import HttpServer, listen, tls_from_environment
from mii.entrypoints.http.settings import CorsSettings, HttpSettings, read_api_keys
from mii.entrypoints.options import cors_options, model_options, read_chat_template
from mii.errors import MIIError
from mii.launch.loop import run
from mii.validation import explain

if TYPE_CHECKING:
    from mii.backend import MIIServer

__all__ = ["serve_app"]

_DRAIN_SECONDS = 10.0
MakeServer = Callable[[HttpSettings], HttpServer]


def serve_app(
    parser: argparse.ArgumentParser, args: argparse.Namespace, make_app: Callable[[HttpSettings], FastAPI]
) -> int:
    """Serves until Ctrl-C or SIGTERM, lets running requests finish, and ends what it has started.

    Args:
        parser: reports what is wrong with the options, and exits.
        args: the options.
        make_app: the app for some settings.

    Returns:
        The exit code: 0, or 1 where the deployment could not start or go on.
    """
    try:
        settings = _settings(args)
        tls = tls_from_environment(os.environ) if getattr(args, "ssl", False) else None
        sockets = listen(args.host, args.port)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    def make_server(settings: HttpSettings) -> HttpServer:
        return HttpServer(make_app(settings), sockets, tls=tls, drain_seconds=_DRAIN_SECONDS)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.load_balancer is None:
            _serve_own(args, settings, make_server, sockets)
        else:
            _serve(make_server(replace(settings, balancer=args.load_balancer)), sockets)
    except (MIIError, ValueError) as error:
        print(f"{parser.prog}: error: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while the deployment was starting; nothing of it is left
        return 130
    finally:
        for listener in sockets:
            listener.close()
    return 0


def _settings(args: argparse.Namespace) -> HttpSettings:
    cors = cors_options(args)
    given = vars(args)
    settings = HttpSettings(
        balancer="",
        model=args.model,
        cors=None if cors is None else CorsSettings(**cors),
        timeout=args.timeout,
        body_bytes=args.max_body_bytes or DEFAULT_BODY_BYTES,
    )
    if "api_keys" not in given:  # the plain server has none of what follows
        return settings
    return replace(
        settings,
        api_keys=read_api_keys(args.api_keys, args.api_key_file),
        chat_template=read_chat_template(args.chat_template),
        response_role=args.response_role,
    )


def _serve_own(
    args: argparse.Namespace, settings: HttpSettings, make_server: MakeServer, sockets: Sequence[socket.socket]
) -> None:
    """Over a deployment that ends with this process, however it does."""
    from mii.api import serve_config
    from mii.backend import MIIServer

    deployment = MIIServer(serve_config(args.model, **model_options(args)), attached=True)
    config = deployment.mii_config
    server = make_server(replace(settings, balancer=address_of("127.0.0.1", config.port_number)))
    watcher = _Watcher(deployment, server)
    watcher.start()
    try:
        _serve(server, sockets)
    finally:
        if watcher.failure is None:
            deployment.terminate()
        watcher.join()
    if watcher.failure is not None:
        raise watcher.failure


class _Watcher(threading.Thread):
    """Prints what happens to a deployment, and stops the HTTP server when it cannot go on."""

    def __init__(self, deployment: MIIServer, server: HttpServer) -> None:
        super().__init__(name="mii-deployment", daemon=True)
        self._deployment, self._server = deployment, server
        self.failure: MIIError | None = None

    def run(self) -> None:
        try:
            for notice in self._deployment.notices():
                print(notice, file=sys.stderr)
        except MIIError as error:
            self.failure = error
        self._server.stop()


def _serve(server: HttpServer, sockets: Sequence[socket.socket]) -> None:
    addresses = ", ".join(address_of(*listener.getsockname()[:2]) for listener in sockets)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        print(f"HTTP on {addresses}", file=sys.stderr, flush=True)
        await server.serve()

    run(main())
