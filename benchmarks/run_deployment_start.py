"""What a deployment adds to the time that loading a model takes.

    taskset -c 0,1 python benchmarks/run_deployment_start.py --json FILE      # on two cores; random weights on a disk
    python benchmarks/run_deployment_start.py --model PATH

Each sample is a process of its own, from its start until the model can be asked: once by `mii.pipeline`, once by
`mii.serve` with its load balancer, front, HTTP gateway and engine. They take turns, and what is said is the difference
of the medians. `processor_s` is what each process of the deployment had computed when it was ready.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.random_engine import write_shape
from mii.benchmark.limits import describe_machine
from mii.benchmark.random_checkpoint import RandomCheckpoint
from mii.benchmark.report import versions, write_json
from mii.benchmark.shapes import SHAPES
from mii.benchmark.start import place_for, write_checkpoint

NAME, SHAPE = "start of a deployment", "smollm2-135m"
PIPELINE = """
import sys, time
import mii
pipe = mii.pipeline(sys.argv[1], device=sys.argv[2], progress=False)
print(time.time())
pipe.destroy()
"""
SERVE = f"""
import json, sys, time
import mii
client = mii.serve(sys.argv[1], deployment_name={NAME!r}, device=sys.argv[2], enable_restful_api=True, progress=False)
print(time.time())
from mii.benchmark.serving.processes import processor_seconds
print(json.dumps(processor_seconds({NAME!r})))
client.terminate_server()
"""


def sample(program: str, model: str, device: str) -> tuple[float, dict[str, float]]:
    """Seconds from a process's start until the model can be asked, and what it printed about processor time."""
    command = [sys.executable, "-c", program, model, device]
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory(prefix="mii-registry-") as registry:
        environment = {"MII_CACHE_PATH": registry, "MII_LOG_LEVEL": "error", "PYTHONPATH": os.pathsep.join(paths)}
        began = time.time()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    ready, *more = done.stdout.splitlines()
    return float(ready) - began, json.loads(more[0]) if more else {}


def measure(model: str, device: str, runs: int) -> dict[str, Any]:
    alone: list[float] = []
    served: list[float] = []
    used: dict[str, float] = {}
    for _ in range(runs):
        alone.append(sample(PIPELINE, model, device)[0])
        seconds, used = sample(SERVE, model, device)
        served.append(seconds)
        print(f"pipeline {alone[-1]:.2f} s, deployment {served[-1]:.2f} s", file=sys.stderr, flush=True)
    added = median(served) - median(alone)
    return {"added_s": added, "pipeline_s": alone, "deployment_s": served, "processor_s": used}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what a deployment's start adds to loading the model.")
    parser.add_argument("--model", help=f"a folder or id (default: random weights of {SHAPE})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each, after one to warm up (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    args = parser.parse_args()
    checkpoint = RandomCheckpoint(SHAPES[SHAPE], torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="mii-deployment-start-", dir=place_for(checkpoint)) as folder:
        if args.model is None:
            write_shape(SHAPE, Path(folder))
            write_checkpoint(Path(folder), checkpoint)
        model = args.model or folder
        sample(SERVE, model, args.device)  # so that files are in memory for both
        found = measure(model, args.device, args.runs)
    print(f"a deployment adds {found['added_s']:.2f} s", flush=True)
    if args.json is not None:
        machine = {**describe_machine(torch.device(args.device)), "cores_used": len(os.sched_getaffinity(0))}
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report = {"benchmark": "deployment start", "date": date, "machine": machine, "versions": versions()}
        write_json({**report, "model": args.model or SHAPE, **found}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
