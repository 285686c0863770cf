"""What has to be proven on several GPUs of one machine, by one command: as benchmarks/card.py, with these parts.

    python benchmarks/card_many.py --wheels wheels --out results --gpus 2
    python benchmarks/card_many.py --wheels wheels --out results --gpus 4 --parts offline --shapes llama3-70b

    install     as there
    tests       tests/gpu/test_all_reduce.py, test_ranks.py and test_scale.py
    all-reduce  benchmarks/run_all_reduce.py with a rank for each GPU
    sanitizer   compute-sanitizer memcheck over the sums of processes with a GPU each
    offline     `mii bench offline --tensor-parallel`, for each of `--shapes`
    replicas    benchmarks/run_replicas.py: one replica against one for each GPU
    starts      benchmarks/run_starts.py: `--starts` deployments and as many engines, and what memory is left

Deployments need, beside what card.py says: grpcio, grpcio-health-checking, grpcio-reflection, protobuf, pyzmq, msgspec.
On two H100 the parts take about 15, 60, 25, 90, 75, 110 and 180 seconds; what does not fit into `--within` is not run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from card import errors_reported, install, outcome_of, working_filter
from card_parts import (
    Card,
    Outcome,
    Part,
    find_sanitizer,
    parser_of,
    pytest_on,
    read_arguments,
    read_json,
    read_report,
    run_parts,
    size_of,
)

LIMITS = {"install": 60, "tests": 120, "all-reduce": 60, "sanitizer": 150, "offline": 200, "replicas": 200,
          "starts": 300}  # fmt: skip
TESTED = ("test_all_reduce.py", "test_ranks.py", "test_scale.py")
SANITIZED = "order_of_the_ranks and not streams"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def tests(card: Card, log: IO[str], limit: float) -> Outcome:
    report = card.work / "many.xml"
    command = pytest_on(f"tests/gpu/{TESTED[0]}", report)
    command += [f"tests/gpu/{name}" for name in TESTED[1:]] + ["--durations=10"]
    code = card.run(command, log, limit)
    counts = read_report(report)
    return Outcome("tests", code == 0 and counts["passed"] > 0, figures={**counts, "exit code": code})


def all_reduce(card: Card, log: IO[str], limit: float, gpus: int) -> Outcome:
    target = card.out / f"all-reduce-{gpus}.json"
    code = card.run([*TORCHRUN, str(gpus), "benchmarks/run_all_reduce.py", "--json", str(target)], log, limit)
    sizes = len(read_json(target).get("results", []))
    return Outcome("all-reduce", code == 0 and sizes > 0, figures={"sizes": sizes, "exit code": code})


def sanitizer(card: Card, log: IO[str], limit: float) -> Outcome:
    """The ranks are processes that pytest starts, so those of all are looked at."""
    tool, begin = find_sanitizer(), time.monotonic()
    if tool is None:
        return Outcome("sanitizer", False, figures={"compute-sanitizer": "not found"})
    memcheck = [tool, "--tool", "memcheck", "--target-processes", "all"]
    options = working_filter(card, log, memcheck, limit)
    if options is None:
        return Outcome("sanitizer", False, figures={"planted error": "not reported"})
    report = card.work / "sanitized-many.xml"
    command = [*memcheck, *options, *pytest_on("tests/gpu/test_all_reduce.py", report), "-k", SANITIZED]
    start = size_of(log)
    code = card.run(command, log, limit - (time.monotonic() - begin))
    said = outcome_of(code, read_report(report), errors_reported(log, start), time.monotonic() - begin)
    return Outcome("sanitizer", said.endswith("clean"), figures={"with": " ".join(options), "sums": said})


def offline(card: Card, log: IO[str], limit: float, args: argparse.Namespace) -> Outcome:
    figures: dict[str, Any] = {}
    end = time.monotonic() + limit
    for shape in args.shapes:
        target = card.out / f"offline-{shape}-{args.gpus}.json"
        command = [sys.executable, "-m", "mii", "bench", "offline", "--shape", shape, "--json", str(target)]
        command += ["--tensor-parallel", str(args.gpus), *args.offline.split()]
        code = card.run(command, log, end - time.monotonic())
        figures[shape] = f"{len(read_json(target).get('rows', []))} rows" if code == 0 else f"exit code {code}"
    return Outcome("offline", all(text.endswith("rows") for text in figures.values()), figures=figures)


def replicas(card: Card, log: IO[str], limit: float, gpus: int) -> Outcome:
    target = card.out / f"replicas-{gpus}.json"
    command = [sys.executable, "benchmarks/run_replicas.py", "llama3-8b", "--replicas", "1", str(gpus)]
    code = card.run([*command, "--json", str(target)], log, limit)
    points = read_json(target).get("points", [])
    figures: dict[str, Any] = {"exit code": code}
    for point in points:
        figures[f"{point['replicas']} replicas"] = f"{point['answer_tokens_per_s']:.0f}/s, {point['scaling']:.3f}"
    return Outcome("replicas", code == 0 and len(points) == 2, figures=figures)


def starts(card: Card, log: IO[str], limit: float, gpus: int, times: int) -> Outcome:
    target = card.out / f"starts-{gpus}.json"
    command = [sys.executable, "benchmarks/run_starts.py", "--times", str(times), "--ranks", str(gpus)]
    code = card.run([*command, "--at-once", "10", "--json", str(target)], log, limit)
    found = read_json(target)
    kinds = ("deployments", "engines")
    lost: dict[str, Any] = {kind: f"{found[kind]['lost'] / (1 << 20):.1f} MiB" for kind in kinds if kind in found}
    return Outcome("starts", code == 0 and len(lost) == 2, figures={"times": times, **lost, "exit code": code})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(LIMITS, within=570.0)
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="that take part (default: 2)")
    parser.add_argument("--shapes", nargs="+", default=["llama3-8b"], help="for the part offline")
    parser.add_argument("--offline", default="", metavar="OPTIONS", help="more options of mii bench offline")
    parser.add_argument("--starts", type=int, default=50, metavar="N", help="for the part starts (default: 50)")
    args = read_arguments(parser, LIMITS, arguments)
    parts: dict[str, Part] = {
        "install": install,
        "tests": tests,
        "all-reduce": partial(all_reduce, gpus=args.gpus),
        "sanitizer": sanitizer,
        "offline": partial(offline, args=args),
        "replicas": partial(replicas, gpus=args.gpus),
        "starts": partial(starts, gpus=args.gpus, times=args.starts),
    }
    return run_parts(args, parts)


if __name__ == "__main__":
    sys.exit(main())
