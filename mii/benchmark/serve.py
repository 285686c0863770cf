"""`mii bench serve`: how fast a running deployment, or any server with OpenAI's completions, answers under load.

    mii bench serve --deployment demo --clients 1 2 4 8 16 32 --json result.json --plot result.png
    mii bench serve --deployment demo --rate 2 4 8 --mix chat
    mii bench serve --url http://localhost:8000/v1/completions --model NAME --vocab 32000

The method is that of DeepSpeed-FastGen's benchmark: prompts and answers of normally distributed lengths, clients that
send one request after the other, effective throughput under an agreement on speed. Requests and tokens a second are
counted, end-of-text is ignored, so that every answer has the length that was drawn. An API key for HTTP is read from
OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii.benchmark.shapes import MIXES
from mii.cli_options import name_and_value

if TYPE_CHECKING:
    from mii.benchmark.serving.load import Load
    from mii.benchmark.serving.server import Server
    from mii.benchmark.serving.target import Target
    from mii.benchmark.serving.work import Work

__all__ = ["add_arguments", "measure", "run"]

_CLIENTS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
_BUSY_SHARE = 0.8  # of one core: above it the load generator itself is slow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    _add_target(parser.add_argument_group("what answers (one of --deployment, --port and --url)"))
    load = parser.add_argument_group("load")
    how = load.add_mutually_exclusive_group()
    how.add_argument(
        "--clients",
        type=_count,
        nargs="+",
        metavar="N",
        help="clients that each send one request after the other; several are measured in turn (default: 1 to 32)",
    )
    how.add_argument("--rate", type=_positive, nargs="+", metavar="R", help="requests a second, at random times")
    load.add_argument("--requests", type=_count, metavar="N", help="of each load (default: 32 + 4 a client; 200)")
    load.add_argument(
        "--warmup", type=_whole, default=1, metavar="N", help="requests of each client before (default: 1)"
    )
    _add_work(parser.add_argument_group("requests"))
    result = parser.add_argument_group("result")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    result.add_argument("--plot", type=Path, metavar="FILE", help="draw them into this file, such as result.png")


def _add_target(target: argparse._ArgumentGroup) -> None:
    target.add_argument("--deployment", metavar="NAME", help="a deployment of yours on this machine")
    target.add_argument(
        "--api",
        choices=("grpc", "rpc", "mii", "completions"),
        default="grpc",
        help="of --deployment (default: grpc, whose streams share a call; rpc has a call for each)",
    )
    target.add_argument("--host", default="localhost", help="where a load balancer or replica listens (gRPC)")
    target.add_argument("--port", type=_count, metavar="N", help="its port")
    target.add_argument("--url", help="an HTTP route: .../mii/<name>, .../v1/completions or .../v1/chat/completions")
    target.add_argument("--model", help="the name that requests to --url ask for (default: the first that it lists)")
    target.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="of a request (default: 600)")


def _add_work(work: argparse._ArgumentGroup) -> None:
    work.add_argument("--mix", choices=tuple(MIXES), help="lengths of `mii bench offline`; else normally distributed:")
    work.add_argument("--mean-prompt-length", type=_positive, default=2600, metavar="N", help="tokens (default: 2600)")
    work.add_argument("--prompt-length-var", type=_share, default=0.3, metavar="X", help="spread / mean (default: 0.3)")
    work.add_argument("--max-prompt-length", type=_count, default=4000, metavar="N", help="longer ones are cut (4000)")
    work.add_argument("--mean-max-new-tokens", type=_positive, default=60, metavar="N", help="tokens (default: 60)")
    work.add_argument(
        "--max-new-tokens-var", type=_share, default=0.3, metavar="X", help="spread / mean (default: 0.3)"
    )
    work.add_argument("--text", type=Path, metavar="FILE", help="prompts are windows over this text, not random tokens")
    work.add_argument("--tokenizer", metavar="MODEL", help="that counts the text's tokens (default: the deployment's)")
    work.add_argument(
        "--vocab", type=_count, metavar="N", help="random token ids are below this (default: the server's)"
    )
    work.add_argument("--seed", type=_whole, default=42, help="of lengths, prompts and arrivals (default: 42)")
    work.add_argument("--no-stream", action="store_true", help="answers are sent when they are complete")
    work.add_argument(
        "--param",
        action="append",
        default=[],
        type=name_and_value,
        metavar="NAME=VALUE",
        help="an option of every request, as JSON, by its name in the API; null takes one away; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the files; returns the command's exit code: 1 if nothing was answered.

    Raises:
        argparse.ArgumentError: options contradict each other.
        mii.errors.MIIError: the server is not there, or a picture cannot be drawn.
        ValueError: requests do not fit the server.
    """
    from mii.benchmark.report import write_json
    from mii.benchmark.serving.plot import check_can_plot, draw
    from mii.benchmark.serving.report import print_table
    from mii.launch.loop import run as run_loop

    if args.plot is not None:
        check_can_plot()
    report = run_loop(measure(args, say=lambda line: print(line, flush=True)))
    print_table(report["points"])
    if args.json is not None:
        write_json(report, args.json)
        print(f"written to {args.json}")
    if args.plot is not None:
        draw(report, args.plot)
        print(f"drawn to {args.plot}")
    return 0 if all(point["completed"] for point in report["points"]) else 1


async def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every load and gives the report."""
    from mii.benchmark.serving.report import describe_host, make_report
    from mii.benchmark.serving.server import find_server
    from mii.benchmark.serving.target import make_target

    machine = describe_host()
    server = await find_server(args)
    work = _work(args, server)
    target = make_target(server.spec)
    points = []
    try:
        for load in _loads(args):
            points.append(await _measure_load(args, server, target, work, load))
            say(_line(points[-1]))
    finally:
        await target.close()
    return make_report(target=server.described, workload=_describe(args, server), machine=machine, points=points)


async def _measure_load(
    args: argparse.Namespace, server: Server, target: Target, work: Work, load: Load
) -> dict[str, Any]:
    from mii.benchmark.serving.figures import distribution, figures
    from mii.benchmark.serving.load import Load, pack, run_load
    from mii.benchmark.serving.processes import processor_seconds, used_since

    exact = server.spec.exact
    clients = load.clients or 4
    if args.warmup:
        warmup = pack(target, work.take(args.warmup * clients))
        await run_load(target, warmup, Load(clients=clients), exact=exact)
    requests = pack(target, work.take(args.requests or (32 + 4 * load.clients if load.clients else 200)))
    before = processor_seconds(server.deployment) if server.deployment else {}
    ran = await run_load(target, requests, load, exact=exact, seed=args.seed)
    found = {"load": load.as_dict(), **figures(ran.traces, load.clients)}
    found["generator"] = {"processor_s": ran.processor_seconds, "late_s": distribution(ran.lateness)}
    if before:
        found["processor_s"] = used_since(before, processor_seconds(server.deployment))
    return found


def _loads(args: argparse.Namespace) -> list[Load]:
    from mii.benchmark.serving.load import Load

    if args.rate:
        return [Load(rate=rate) for rate in args.rate]
    return [Load(clients=clients) for clients in args.clients or _CLIENTS]


def _work(args: argparse.Namespace, server: Server) -> Work:
    from mii.benchmark.serving.work import RandomIds, TextWindows, Work, mix_lengths, normal_lengths

    if args.mix:
        lengths = mix_lengths(args.mix)
    else:
        lengths = normal_lengths(
            args.mean_prompt_length,
            args.prompt_length_var,
            args.max_prompt_length,
            args.mean_max_new_tokens,
            args.max_new_tokens_var,
        )
    if args.text is None:
        return Work(lengths, RandomIds(server.vocab, args.seed), args.seed, server.max_length)
    from mii.modeling.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(server.tokenizer)
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    windows = TextWindows(ids, tokenizer.decode)
    return Work(lengths, windows, args.seed, server.max_length)


def _describe(args: argparse.Namespace, server: Server) -> dict[str, Any]:
    """What was asked for, by the names of the options."""
    names = ["mix", "requests", "warmup", "seed"]
    if not args.mix:
        names += ["mean_prompt_length", "prompt_length_var", "max_prompt_length"]
        names += ["mean_max_new_tokens", "max_new_tokens_var"]
    described = {name: getattr(args, name) for name in names}
    lengths = args.mix or f"prompts of {args.mean_prompt_length:g} tokens, answers of {args.mean_max_new_tokens:g}"
    described |= {"text": str(args.text) if args.text else None, "stream": server.spec.stream}
    return {"name": lengths, **described, "options": server.spec.options}


def _line(point: dict[str, Any]) -> str:
    line = (
        f"{point['load']['name']}: {point['requests_per_s']:,.4g} requests/s, "
        f"{point['answer_tokens_per_s']:,.4g} answer tokens/s"
    )
    errors = point["errors"]
    if errors["count"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in errors["kinds"].items())
        line += f"; {errors['count']} of {point['requests']} failed ({kinds}), such as: {errors['messages'][0]}"
    share = point["generator"]["processor_s"] / point["seconds"]
    if share > _BUSY_SHARE:
        line += f"; note: the load generator itself took {share:.0%} of a core, so it may be what bounds these figures"
    return line


def _positive(text: str) -> float:
    return _number(text, float, lambda value: value > 0, "a number above 0")


def _share(text: str) -> float:
    return _number(text, float, lambda value: value >= 0, "a number from 0 up")


def _count(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 1, "a whole number from 1 up"))


def _whole(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 0, "a whole number from 0 up"))


def _number(text: str, kind: type, allowed: Callable[[float], bool], words: str) -> float:
    try:
        value: float = kind(text)
    except ValueError:
        value = float("nan")
    if not allowed(value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return value
