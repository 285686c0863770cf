"""How much faster two replicas answer than one: deployments of each size, with random weights, under the chat mix.

    python benchmarks/run_replicas.py llama3-8b --replicas 1 2 --json FILE        # a GPU for each replica
    python benchmarks/run_replicas.py smollm2-135m --device cpu --layers 2 --requests 16     # the same in small

Each replica is given the whole mix, so that all of them work as hard as one alone: N replicas get N times as many
requests, all at once, as streams. `scaling` is the answer tokens a second over those of the smallest deployment, each
the best of `--runs` after one to warm up. On a CPU replicas share the cores, so there is no scaling to be seen.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.random_engine import write_shape
from benchmarks.run_share import NAME, serving
from mii.backend import MIIClient
from mii.benchmark.report import versions, write_json
from mii.benchmark.serving.figures import figures
from mii.benchmark.serving.load import Load, pack, run_load
from mii.benchmark.serving.processes import processor_seconds, used_since
from mii.benchmark.serving.report import describe_host
from mii.benchmark.serving.target import GRPC, TargetSpec, make_target
from mii.benchmark.serving.work import Ask
from mii.benchmark.shapes import SHAPES, Job, make_mix, with_fresh_ids
from mii.launch.loop import run as run_loop

AT_ONCE = Load(rate=1e9)


def jobs_of(args: argparse.Namespace, replicas: int, run: int) -> list[Job]:
    """The mix once for each replica; no two prompts begin alike."""
    vocabulary = int(SHAPES[args.shape]["vocab_size"])
    jobs = make_mix("chat", vocabulary)[: args.requests]
    return [job for copy in range(replicas) for job in with_fresh_ids(jobs, vocabulary, 100 * run + copy)]


def target_of(client: MIIClient, api: str) -> TargetSpec:
    """Where the requests go: greedy, and to their length."""
    config = client.mii_config
    if api in GRPC:
        options: dict[str, Any] = {"ignore_eos": True, "do_sample": False}
        return TargetSpec(api, f"{config.host}:{config.port_number}", options=options)
    url, options = f"http://127.0.0.1:{config.restful_api_port}/v1/completions", {"ignore_eos": True, "temperature": 0}
    return TargetSpec(api, url, model=config.model_conf.model_name_or_path, options=options)


async def speed(client: MIIClient, args: argparse.Namespace, replicas: int) -> dict[str, Any]:
    """The figures of the best run."""
    target, found = make_target(target_of(client, args.api)), []
    try:
        for run in range(args.runs + 1):
            asks = [Ask(job.prompt_ids, len(job.prompt_ids), job.new_tokens) for job in jobs_of(args, replicas, run)]
            requests, before = pack(target, asks), processor_seconds(NAME)
            ran = await run_load(target, requests, AT_ONCE, exact=True)
            used = {**used_since(before, processor_seconds(NAME)), "generator": ran.processor_seconds}
            found.append({**figures(ran.traces), "processor_s": used})
            print(f"{replicas} replicas, a run: {found[-1]['answer_tokens_per_s']:,.0f} answer tokens/s", flush=True)
    finally:
        await target.close()
    return max(found[1:], key=lambda each: each["answer_tokens_per_s"])


def measure(args: argparse.Namespace, replicas: int) -> dict[str, Any]:
    """One deployment, from its start to its end."""
    options: dict[str, Any] = {"replica_num": replicas, "enable_restful_api": args.api not in GRPC}
    if args.device != "cpu":
        options["device_map"] = [[index] for index in range(replicas)]
    with tempfile.TemporaryDirectory(prefix="mii-replicas-") as folder:
        write_shape(args.shape, Path(folder), args.layers)
        with serving(folder, args.device, random_weights=True, **options) as client:
            return {"replicas": replicas, **run_loop(speed(client, args, replicas))}


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares deployments of one and of several replicas.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2)")
    parser.add_argument("--api", choices=("grpc", "completions"), default="grpc", help="(default: grpc)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--layers", type=int, help="of the shape (default: all)")
    parser.add_argument("--requests", type=int, help="of the chat mix, for each replica (default: all 768)")
    parser.add_argument("--runs", type=int, default=1, help="after the one that warms up (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(words)


def main() -> int:
    args = read_arguments()
    points = [measure(args, replicas) for replicas in sorted(args.replicas)]
    for point in points:
        point["scaling"] = point["answer_tokens_per_s"] / points[0]["answer_tokens_per_s"]
        print(f"{point['replicas']} replicas: {point['answer_tokens_per_s']:,.0f}/s, {point['scaling']:.3f} times")
    report = {
        "benchmark": "replicas",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "machine": describe_host(),
        "versions": versions(),
        "model": {"name": args.shape, "layers": args.layers or SHAPES[args.shape]["num_hidden_layers"]},
        "points": points,
    }
    if args.json is None:
        print(json.dumps(report))
    else:
        write_json(report, args.json)
    return 1 if any(point["errors"]["count"] for point in points) else 0


if __name__ == "__main__":
    sys.exit(main())
