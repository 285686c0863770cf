"""Starts and stops models that are divided among GPUs, and looks for memory that is left.

    python benchmarks/run_starts.py --times 50 --ranks 2 --at-once 5 --json FILE
    python benchmarks/run_starts.py --times 2 --ranks 2 --device cpu          # the same without anything to look for

`deployments`: whole deployments with their processes, `--at-once` of them beside each other. `engines`: one process
for each rank, which makes an engine, has it answer and destroys it, again and again; what its CUDA context holds after
the first of them stays. Exits with 1 where memory is left: of deployments more than `DRIFT` bytes of a GPU, of engines
after the second more than that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mii
from benchmarks.random_engine import write_shape
from mii.batching.data_classes import EngineRequest
from mii.benchmark import ranks
from mii.benchmark.limits import describe_machine
from mii.benchmark.random_checkpoint import RandomCheckpoint
from mii.benchmark.report import versions, write_json
from mii.benchmark.shapes import SHAPES
from mii.benchmark.start import write_checkpoint
from mii.logging import set_level

SHAPE, LAYERS = "smollm2-135m", 4
# Counted in blocks: a share of what is free would depend on the deployments that start at the same time.
CACHE = {"inference_engine_config": {"state_manager": {"memory_config": {"mode": "allocate", "size": 64}}}}
DRIFT = 16 << 20  # bytes: the driver itself gives and takes some
_FREED_SECONDS = 5.0


def free_bytes(device: str) -> list[int]:
    """Of each GPU, as the driver counts them over all processes."""
    if device == "cpu":
        return []
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def settled(device: str, wanted: list[int]) -> list[int]:
    """The same once it is what is wanted, or after a while: the driver frees what a process had after its end."""
    deadline = time.monotonic() + _FREED_SECONDS
    while any(now + DRIFT < before for now, before in zip(free_bytes(device), wanted, strict=True)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return free_bytes(device)


def write_model(folder: Path) -> None:
    """A small model with weights and a tokenizer."""
    write_shape(SHAPE, folder, LAYERS)
    fields = {**SHAPES[SHAPE], "num_hidden_layers": LAYERS}
    write_checkpoint(folder, RandomCheckpoint(fields, torch.device("cpu")))


def start_and_stop(number: int, model: str, args: argparse.Namespace) -> None:
    """One deployment, which answers once."""
    name = f"starts and stops {number}"
    options = {"device": args.device, "progress": False, "tensor_parallel": args.ranks, **CACHE}
    client = mii.serve(model, deployment_name=name, drain_seconds=1, **options)
    try:
        answer = client.generate("One", max_new_tokens=4, ignore_eos=True)
        assert answer is not None and answer[0].generated_length == 4, answer
    finally:
        client.terminate_server()


def deployments(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Free memory before, and after each batch of them."""
    before, after = free_bytes(args.device), []
    with ThreadPoolExecutor(args.at_once) as pool:
        for first in range(0, args.times, args.at_once):
            numbers = range(first, min(args.times, first + args.at_once))
            list(pool.map(lambda number: start_and_stop(number, model, args), numbers))
            after.append(settled(args.device, before))
            print(f"deployments: {numbers.stop} ended, free {after[-1]}", flush=True)
    return {"before": before, "after": after, "lost": lost(before, after[-1])}


def engines(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Free memory while the processes are there, after each engine, and when they have ended."""
    before, after = free_bytes(args.device), []
    given = {"shape": model, "layers": None, "device": args.device, "dtype": "auto", "option": list(CACHE.items())}
    shown = argparse.Namespace(**given, tensor_parallel=args.ranks, verbose=False)
    with ranks.crew(shown) as crew:
        for number in range(args.times):
            with crew.engine() as engine:
                engine.add_request(EngineRequest(uid=number, prompt_ids=[5, 6, 7], max_new_tokens=4))
                while engine.has_work:
                    engine.step()
            after.append(free_bytes(args.device))
    print(f"engines: {args.times} ended, free {after[0]} after the first, {after[-1]} after the last", flush=True)
    ended = settled(args.device, before)
    base = after[min(1, len(after) - 1)]
    return {"before": before, "after": after, "ended": ended, "lost": lost(base, after[-1])}


def lost(before: list[int], after: list[int]) -> int:
    """The most that is missing on a GPU."""
    return max((then - now for then, now in zip(before, after, strict=True)), default=0)


KINDS: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {
    "deployments": deployments,
    "engines": engines,
}


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Starts and stops divided models, and looks for what is left.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--times", type=int, default=50, metavar="N", help="of each kind (default: 50)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="deployments beside each other")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(words)


def main() -> int:
    args = read_arguments()
    set_level("warning")
    free_bytes(args.device)  # this process's own contexts are there before anything is counted
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mii-starts-") as folder:
        write_model(Path(folder))
        for kind in args.kinds:
            began = time.monotonic()
            found[kind] = {**KINDS[kind](folder, args), "seconds": time.monotonic() - began}
            print(f"{kind}: {found[kind]['lost'] / (1 << 20):.1f} MiB lost", flush=True)
    about = {"benchmark": "starts", "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    machine = {"machine": describe_machine(torch.device(args.device)), "versions": versions()}
    if args.json is not None:
        write_json({**about, **machine, "times": args.times, "ranks": args.ranks, **found}, args.json)
    return 1 if any(each["lost"] > DRIFT for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
