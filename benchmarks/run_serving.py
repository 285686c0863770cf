"""What serving adds to an engine: every process of a deployment is real but the engine, which emits tokens at a rate.

    python benchmarks/run_serving.py [--only ROW ...] [--seconds S] [--json FILE]
    python benchmarks/run_serving.py --json -      # all figures as JSON, on standard output

A token's added time is from the moment when the stand-in engine (tests/serving/standin.py) emitted it until the load
generator (mii bench serve) had it. Rates and times are those of the middle half of a run, when all streams are there.
In the rows "grpc" streams share an RPC, as those of `MIIClient.astream` in one event loop do; in "rpc" each is a
`GeneratorReplyStream` of its own, which is what other programs use.
Needs what the tests need: pip install -e '.[dev]'.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mii.benchmark.report import versions, write_json
from mii.benchmark.serving.figures import distribution
from mii.benchmark.serving.load import Load, Ran, pack, run_load
from mii.benchmark.serving.processes import processor_seconds, used_since
from mii.benchmark.serving.report import describe_host
from mii.benchmark.serving.target import TargetSpec, make_target
from mii.benchmark.serving.trace import Trace
from mii.benchmark.serving.work import Ask, RandomIds, Work, normal_lengths
from mii.launch.loop import run as run_loop
from tests.checkpoints import byte_tokenizer
from tests.serving.clusters import NAME, Cluster, running_cluster
from tests.serving.crowd import http_options
from tests.serving.standin import Options

PROMPT, ANSWER, SPREAD, VOCABULARY = 64, 128, 0.3, 261


@dataclass(frozen=True)
class Row:
    """One load: streams of one API, and the tokens a second that they get in all."""

    api: str
    streams: int
    rate: int


ROWS = {
    "grpc-512": Row("grpc", 512, 20_000),
    "rpc-512": Row("rpc", 512, 20_000),
    "http-512": Row("completions", 512, 10_000),
    "grpc-32": Row("grpc", 32, 1_600),
    "rpc-32": Row("rpc", 32, 1_600),
    "http-32": Row("completions", 32, 1_600),
}


@dataclass(frozen=True)
class Measured:
    """A run: what was asked, what came of it, what it cost."""

    asks: list[Ask]
    ran: Ran
    processor: dict[str, float]
    busy: float


@contextlib.contextmanager
def deployment(row: Row, folder: Path) -> Iterator[Cluster]:
    """One replica with a stand-in engine of the row's rate. When it has ended, the emitted times are in `folder`."""
    (folder / "model").mkdir()
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    options = Options(step_seconds=row.streams / row.rate, record=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MII_CACHE_PATH", str(folder))
        with running_cluster(patch, folder / "model", replicas=1, options=options, **http_options()) as cluster:
            yield cluster
            # In order, so that the engine writes its file; the stop in a hurry that follows finds it gone.
            cluster.client.terminate_server()


def target_of(row: Row, cluster: Cluster) -> TargetSpec:
    if row.api in ("grpc", "rpc"):
        return TargetSpec(row.api, cluster.address, options={"ignore_eos": True, "do_sample": False})
    url = f"http://127.0.0.1:{cluster.config.restful_api_port}/v1/completions"
    model = cluster.config.model_conf.model_name_or_path
    return TargetSpec(row.api, url, model=model, options={"ignore_eos": True, "temperature": 0})


async def load(row: Row, spec: TargetSpec, seconds: float) -> Measured:
    """Runs the load once to warm up and once for the figures."""
    target = make_target(spec)
    work = Work(normal_lengths(PROMPT, SPREAD, 4000, ANSWER, SPREAD), RandomIds(VOCABULARY, 1), 1)
    clients = Load(clients=row.streams)
    try:
        await run_load(target, pack(target, work.take(row.streams)), clients, exact=True)
        asks = work.take(max(row.streams, round(seconds * row.rate / ANSWER)))
        requests = pack(target, asks)
        before, busy = processor_seconds(NAME), machine_seconds()
        ran = await run_load(target, requests, clients, exact=True)
        used = used_since(before, processor_seconds(NAME))
        share = [after - earlier for earlier, after in zip(busy, machine_seconds(), strict=True)]
        return Measured(asks, ran, {**used, "generator": ran.processor_seconds}, share[0] / share[1])
    finally:
        await target.close()


def machine_seconds() -> tuple[float, float]:
    """What all processors of the machine have computed, and how long they were there, in ticks."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def figures(row: Row, measured: Measured, emitted: dict[str, list[float]]) -> dict[str, Any]:
    """What a row's run comes to."""
    traces = measured.ran.traces
    begin, end = min(trace.due for trace in traces), max(trace.ended for trace in traces)
    window = begin + 0.2 * (end - begin), begin + 0.7 * (end - begin)
    pairs = list(zip(sorted(traces, key=lambda trace: trace.sent), measured.asks, strict=True))
    added = [each for trace, ask in pairs for each in added_times(trace, emitted[key(ask)], window)]
    messages = sum(window[0] < now < window[1] for trace in traces for now in trace.times)
    tokens, length = sum(trace.tokens for trace in traces), window[1] - window[0]
    return {
        "api": row.api,
        "streams": row.streams,
        "asked_tokens_per_s": row.rate,
        "tokens_per_s": len(added) / length,
        "messages_per_s": messages / length,
        "added_s": distribution(added),
        "processor_us_per_token": {role: 1e6 * used / tokens for role, used in measured.processor.items()},
        "generator_late_s": distribution(measured.ran.lateness),
        "machine_busy": measured.busy,
        "load_average": os.getloadavg()[0],
        "errors": sum(bool(trace.kind) for trace in traces),
    }


def key(ask: Ask) -> str:
    return " ".join(map(str, ask.prompt))


def added_times(trace: Trace, emitted: list[float], window: tuple[float, float]) -> Iterator[float]:
    """For each token that came within the window, how long after the engine had it."""
    tokens = iter(emitted)
    for now, count in zip(trace.times, trace.counts, strict=True):
        for _ in range(count):
            left = next(tokens)
            if window[0] < now < window[1]:
                yield now - left


def measure(row: Row, seconds: float) -> dict[str, Any]:
    from mii.errors import DeploymentNotFoundError

    with tempfile.TemporaryDirectory(prefix="mii-serving-") as folder:
        with contextlib.suppress(DeploymentNotFoundError), deployment(row, Path(folder)) as cluster:
            measured = run_loop(load(row, target_of(row, cluster), seconds))
        return figures(row, measured, json.loads(Path(folder, "emitted-0.json").read_text()))


def print_row(name: str, found: dict[str, Any]) -> None:
    added, used = found["added_s"], found["processor_us_per_token"]
    speed = f"{found['tokens_per_s']:,.0f} of {found['asked_tokens_per_s']:,} tokens/s"
    times = ", ".join(f"{each} {1e3 * added[each]:.1f}" for each in ("p50", "p90", "p99"))
    print(f"{name}: {speed} in {found['messages_per_s']:,.0f} messages/s; added ms {times}", file=sys.stderr)
    costs = ", ".join(f"{role} {cost:.1f}" for role, cost in used.items())
    busy = f"machine {found['machine_busy']:.0%} busy, load {found['load_average']:.1f}"
    print(f"  processor us/token: {costs}; {busy}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures what serving adds to an engine.")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each run, about (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file; -: print them")
    args = parser.parse_args(arguments)
    machine, rows = describe_host(), {}
    for name in args.only:
        rows[name] = measure(ROWS[name], args.seconds)
        print_row(name, rows[name])
    if args.json is not None:
        report = {"benchmark": "serving", "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        command = shlex.join(["python", "benchmarks/run_serving.py", *sys.argv[1:]])
        report |= {"command": command, "machine": machine, "versions": versions(), "rows": rows}
        if args.json == Path("-"):
            print(json.dumps(report))
        else:
            write_json(report, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
