"""How much of the engine's own speed is left of it through HTTP: the same requests, first without a server, then as
streams of `/v1/completions`. The last line is JSON.

    python benchmarks/run_share.py smollm2                   # SmolLM2 on the CPU, 16 streams, against the pipeline
    python benchmarks/run_share.py llama3-8b                 # random weights, the chat mix, against mii bench offline
    python benchmarks/run_share.py smollm2-135m --device cpu --layers 2 --requests 32    # the same in small

Answers are greedy and end at their length. Each side runs once to warm up and is then the best of `--runs`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mii
from benchmarks.random_engine import write_shape
from mii.backend import MIIClient, deployment
from mii.backend.plan import make_plan
from mii.benchmark.report import versions
from mii.benchmark.serving.figures import figures
from mii.benchmark.serving.load import Load, pack, run_load
from mii.benchmark.serving.processes import processor_seconds, used_since
from mii.benchmark.serving.report import describe_host
from mii.benchmark.serving.target import TargetSpec, make_target
from mii.benchmark.serving.work import Ask
from mii.benchmark.shapes import SHAPES, Job, make_batch, make_mix, with_fresh_ids
from mii.launch.loop import run as run_loop

NAME, SMOLLM2 = "share of HTTP", "smollm2"
STREAMS, PROMPT, ANSWER, SMOLLM2_VOCABULARY = 16, 128, 128, 49152
AT_ONCE = Load(rate=1e9)


def jobs_of(args: argparse.Namespace) -> Callable[[int], list[Job]]:
    """The requests of a run, which are as long in each and begin alike in none."""
    vocabulary = SMOLLM2_VOCABULARY if args.what == SMOLLM2 else int(SHAPES[args.what]["vocab_size"])
    if args.what == SMOLLM2:
        jobs = make_batch(STREAMS, PROMPT, ANSWER, vocabulary)
    else:
        jobs = make_mix("chat", vocabulary)[: args.requests]
    return lambda run: with_fresh_ids(jobs, vocabulary, run)


def pipeline_speed(model: str, runs: list[list[Job]], device: str) -> float:
    """Answer tokens a second of a pipeline; the answers of a run are all of one length."""
    best = 0.0
    with mii.pipeline(model, device=device, progress=False) as pipe:
        for jobs in runs:
            began = time.perf_counter()
            pipe([job.prompt_ids for job in jobs], max_new_tokens=ANSWER, ignore_eos=True, do_sample=False)
            speed = len(jobs) * ANSWER / (time.perf_counter() - began)
            best = max(best, speed)
            _tell("without a server", speed)
    return best


def _tell(which: str, speed: float) -> None:
    """A line for each run: they take a while."""
    print(f"{which}, a run: {speed:,.0f} answer tokens/s", file=sys.stderr, flush=True)


def engine_speed(args: argparse.Namespace, runs: list[list[Job]]) -> float:
    """Answer tokens a second of an engine with random weights, as `mii bench offline` has them."""
    from mii.benchmark.offline import load
    from mii.benchmark.workload import run_jobs

    options = {
        "shape": args.what,
        "layers": args.layers,
        "device": args.device,
        "dtype": "auto",
        "option": [],
        "tensor_parallel": 1,
    }
    engine = load(argparse.Namespace(**options))
    try:
        results = [run_jobs(engine, jobs) for jobs in runs]
    finally:
        engine.destroy()
    return max(result.answer_tokens / result.seconds for result in results)


@contextmanager
def serving(model: str, device: str, *, random_weights: bool, **more: Any) -> Iterator[MIIClient]:
    """A deployment, by default one that answers HTTP, whose engine may make its weights up."""

    def plan(*given: Any, **options: Any) -> Any:
        made = make_plan(*given, **options)
        swap = {"mii.launch.engine": "benchmarks.random_engine"} if random_weights else {}
        processes = [
            msgspec.structs.replace(process, command=[swap.get(part, part) for part in process.command])
            for process in made.processes
        ]
        return msgspec.structs.replace(made, processes=processes)

    with mock.patch.object(deployment, "make_plan", plan):
        client = mii.serve(model, deployment_name=NAME, device=device, **{"enable_restful_api": True, **more})
    try:
        yield client
    finally:
        client.terminate_server()


async def http_speed(client: MIIClient, runs: list[list[Job]]) -> dict[str, Any]:
    """The figures of the best run."""
    config = client.mii_config
    url = f"http://127.0.0.1:{config.restful_api_port}/v1/completions"
    options = {"ignore_eos": True, "temperature": 0}
    target = make_target(TargetSpec("completions", url, model=config.model_conf.model_name_or_path, options=options))
    found = []
    try:
        for jobs in runs:
            requests = pack(target, [Ask(job.prompt_ids, len(job.prompt_ids), job.new_tokens) for job in jobs])
            before = processor_seconds(NAME)
            ran = await run_load(target, requests, AT_ONCE, exact=True)
            used = {**used_since(before, processor_seconds(NAME)), "generator": ran.processor_seconds}
            found.append({**figures(ran.traces), "processor_s": used})
            _tell("over HTTP", found[-1]["answer_tokens_per_s"])
    finally:
        await target.close()
    return max(found, key=lambda each: each["answer_tokens_per_s"])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    jobs = jobs_of(args)
    alone = [jobs(run) for run in range(1, args.runs + 2)]
    served = [jobs(run) for run in range(args.runs + 2, 2 * args.runs + 3)]
    with tempfile.TemporaryDirectory(prefix="mii-share-") as folder:
        if args.what == SMOLLM2:
            from mii.modeling.checkpoint import find_default_model

            model = str(find_default_model())
            base = pipeline_speed(model, alone, args.device)
        else:
            model = folder
            write_shape(args.what, Path(folder), args.layers)
            base = engine_speed(args, alone)
        print(f"without a server: {base:,.0f} answer tokens/s", flush=True)
        with serving(model, args.device, random_weights=args.what != SMOLLM2) as client:
            http = run_loop(http_speed(client, served))
    print(f"over HTTP: {http['answer_tokens_per_s']:,.0f} answer tokens/s", flush=True)
    return {"alone_tokens_per_s": base, "share": http["answer_tokens_per_s"] / base, "http": http}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares HTTP streaming with the engine alone.")
    parser.add_argument("what", choices=(SMOLLM2, *SHAPES))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="(default: cpu for smollm2, else auto)")
    parser.add_argument("--layers", type=int, help="of a shape (default: all)")
    parser.add_argument("--requests", type=int, help="of the chat mix (default: all 768)")
    parser.add_argument("--runs", type=int, help="(default: 5 for smollm2, else 1)")
    args = parser.parse_args()
    args.device = args.device or ("cpu" if args.what == SMOLLM2 else "auto")
    args.runs = args.runs or (5 if args.what == SMOLLM2 else 1)
    found = {"benchmark": "share", "what": args.what, "machine": describe_host(), "versions": versions()}
    found |= measure(args)
    print(json.dumps(found))
    return 1 if found["http"]["errors"]["count"] else 0


if __name__ == "__main__":
    sys.exit(main())
