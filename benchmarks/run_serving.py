"""What serving adds to an engine: every process of a deployment is real but the engine, which emits tokens at a rate.

    python benchmarks/run_serving.py [--only ROW ...] [--seconds S] [--json FILE]
    python benchmarks/run_serving.py --json -      # all figures as JSON, on standard output
    taskset -c 0,1 python benchmarks/run_serving.py                            # two cores in all
    python benchmarks/run_serving.py --deployment-cores 0,1 --generator-cores 2-5    # two for the deployment alone

A token's added time is from the moment when the stand-in engine (tests/serving/standin.py) emitted it until the load
generator (mii bench serve) had it: over HTTP when its event loop read the bytes, over gRPC when it read the message; in
the rows "rpc" when the task that waits for the stream had it. The engine has `streams` answers under way at all times:
a few more clients than that ask, whose requests wait in its queue, so that it never lacks one while a client sends its
next request. Rates and times are those between the moment when the first client's answers have all begun and that when
the last request left.
In the rows "grpc" streams share an RPC, as those of `MIIClient.astream` in one event loop do; in "rpc" each is a
`GeneratorReplyStream` of its own, which is what other programs use.

What bounds the added time of few streams is often the machine: `wake_s` is how long a few bytes take through three
programs that do nothing but pass them on (cat), which is as many wake-ups as a token has from engine to client.

Needs tests/ beside benchmarks/ (tests/checkpoints.py and tests/serving), pytest, transformers, and an mii that is
installed or lies beside them too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

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
WAKE_UPS, WAKE_PAUSE_SECONDS = 250, 0.02


@dataclass(frozen=True)
class Row:
    """One load: streams of one API, and the tokens a second that they get in all."""

    api: str
    streams: int
    rate: int

    @property
    def clients(self) -> int:
        """Those that ask: one in 32 waits for its turn."""
        return self.streams + max(1, self.streams // 32)


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
    options = Options(step_seconds=row.streams / row.rate, max_running=row.streams, record=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MII_CACHE_PATH", str(folder))
        patch.setenv(
            "PYTHONPATH", str(Path(__file__).resolve().parent.parent), prepend=os.pathsep
        )  # of the stand-in's process
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


async def load(row: Row, spec: TargetSpec, seconds: float, cores: Cores) -> Measured:
    """Runs the load once to warm up and once for the figures."""
    cores.enter_generator()
    target = make_target(spec)
    work = Work(normal_lengths(PROMPT, SPREAD, 4000, ANSWER, SPREAD), RandomIds(VOCABULARY, 1), 1)
    clients = Load(clients=row.clients)
    try:
        await run_load(target, pack(target, work.take(row.clients)), clients, exact=True)
        asks = work.take(row.clients + max(row.clients, round(seconds * row.rate / ANSWER)))
        requests = pack(target, asks)
        before, busy = processor_seconds(NAME), cores.seconds()
        ran = await run_load(target, requests, clients, exact=True)
        used = used_since(before, processor_seconds(NAME))
        share = [after - earlier for earlier, after in zip(busy, cores.seconds(), strict=True)]
        return Measured(asks, ran, {**used, "generator": ran.processor_seconds}, share[0] / share[1])
    finally:
        await target.close()


class Cores:
    """Which cores run what; by default all that this process may use run everything.

    Args:
        deployment: of the deployment; empty: all.
        generator: of the load generator; empty: all.
    """

    def __init__(self, deployment: set[int], generator: set[int]) -> None:
        everywhere = os.sched_getaffinity(0)
        self._deployment, self._generator = deployment or everywhere, generator or everywhere

    def enter_deployment(self) -> None:
        """For this process, and those that it starts from now on."""
        self._enter(self._deployment)

    def enter_generator(self) -> None:
        """For this process, all of its threads."""
        self._enter(self._generator)

    def seconds(self) -> tuple[float, float]:
        """What all of them have computed, and how long they were there, in ticks."""
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
        used = {f"cpu{core}" for core in self._deployment | self._generator}
        fields = [[int(field) for field in ticks] for name, *ticks in lines if name in used]
        everything = sum(map(sum, fields))
        return everything - sum(ticks[3] + ticks[4] for ticks in fields), everything

    def as_dict(self) -> dict[str, list[int]]:
        return {"deployment": sorted(self._deployment), "generator": sorted(self._generator)}

    def _enter(self, cores: set[int]) -> None:
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(int(thread.name), cores)


def wake_ups() -> list[float]:
    """Seconds that a few bytes take through three programs, each of which sleeps until they come, for each of several
    times as far apart as the steps of the engine.
    """
    with contextlib.ExitStack() as stack:
        programs: list[subprocess.Popen[bytes]] = []
        for _ in range(3):
            source = programs[-1].stdout if programs else subprocess.PIPE
            program = subprocess.Popen(["cat"], stdin=source, stdout=subprocess.PIPE, bufsize=0)
            stack.callback(program.wait)
            stack.callback(program.kill)
            programs.append(program)
        into, out = programs[0].stdin, programs[-1].stdout
        assert into is not None and out is not None
        return [_pass_on(into, out) for _ in range(WAKE_UPS)][1:]


def _pass_on(into: IO[bytes], out: IO[bytes]) -> float:
    time.sleep(WAKE_PAUSE_SECONDS)
    began = time.monotonic()
    into.write(b"token")
    out.read(5)
    return time.monotonic() - began


def figures(row: Row, measured: Measured, emitted: dict[str, list[float]]) -> dict[str, Any]:
    """What a row's run comes to."""
    traces = sorted(measured.ran.traces, key=lambda trace: trace.sent)
    began = [trace.times[0] for trace in traces[: row.clients] if trace.times]
    window = max(began), traces[-1].sent
    pairs = list(zip(traces, measured.asks, strict=True))
    added = [each for trace, ask in pairs for each in added_times(trace, emitted[key(ask)], window)]
    messages = sum(window[0] < now < window[1] for trace in traces for now in trace.times)
    left = sum(window[0] < now < window[1] for ask in measured.asks for now in emitted[key(ask)])
    tokens, length = sum(trace.tokens for trace in traces), window[1] - window[0]
    return {
        "api": row.api,
        "streams": row.streams,
        "clients": row.clients,
        "asked_tokens_per_s": row.rate,
        "emitted_tokens_per_s": left / length,
        "tokens_per_s": len(added) / length,
        "messages_per_s": messages / length,
        "added_s": distribution(added),
        "processor_us_per_token": {role: 1e6 * used / tokens for role, used in measured.processor.items()},
        "generator_late_s": distribution(measured.ran.lateness),
        "seconds": length,
        "cores_busy": measured.busy,
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


def measure(row: Row, seconds: float, cores: Cores) -> dict[str, Any]:
    from mii.errors import DeploymentNotFoundError

    cores.enter_deployment()
    with tempfile.TemporaryDirectory(prefix="mii-serving-") as folder:
        with contextlib.suppress(DeploymentNotFoundError), deployment(row, Path(folder)) as cluster:
            measured = run_loop(load(row, target_of(row, cluster), seconds, cores))
        return figures(row, measured, json.loads(Path(folder, "emitted-0.json").read_text()))


def print_row(name: str, found: dict[str, Any]) -> None:
    added, used = found["added_s"], found["processor_us_per_token"]
    speed = f"{found['tokens_per_s']:,.0f} of {found['emitted_tokens_per_s']:,.0f} tokens/s emitted"
    speed += f" ({found['asked_tokens_per_s']:,} asked)"
    print(f"{name}: {speed} in {found['messages_per_s']:,.0f} messages/s; added ms {shown_ms(added)}", file=sys.stderr)
    costs = ", ".join(f"{role} {cost:.1f}" for role, cost in used.items())
    busy = f"cores {found['cores_busy']:.0%} busy, load {found['load_average']:.1f}"
    print(f"  processor us/token: {costs}; {busy}", file=sys.stderr, flush=True)


def shown_ms(found: dict[str, float]) -> str:
    return ", ".join(f"{each} {1e3 * found[each]:.1f}" for each in ("p50", "p90", "p99"))


def core_list(text: str) -> set[int]:
    """Cores such as "0,1" or "2-5,8"."""
    parts = [part.partition("-") for part in text.split(",")]
    cores = {core for first, _, last in parts for core in range(int(first), int(last or first) + 1)}
    missing = cores - os.sched_getaffinity(0)
    if missing or not cores:
        raise argparse.ArgumentTypeError(f"this process may not use core {', '.join(map(str, sorted(missing)))}")
    return cores


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures what serving adds to an engine.")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each run, about (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file; -: print them")
    parser.add_argument("--deployment-cores", type=core_list, default=set(), metavar="LIST", help="such as 0,1 or 0-3")
    parser.add_argument(
        "--generator-cores", type=core_list, default=set(), metavar="LIST", help="of the load generator"
    )
    args = parser.parse_args(arguments)
    cores = Cores(args.deployment_cores, args.generator_cores)
    machine, rows = {**describe_host(), "cores_used": cores.as_dict()}, {}
    cores.enter_deployment()
    machine["wake_s"] = distribution(wake_ups())
    print("a byte through three programs, ms: " + shown_ms(machine["wake_s"]), file=sys.stderr)
    for name in args.only:
        rows[name] = measure(ROWS[name], args.seconds, cores)
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
