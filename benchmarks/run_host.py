"""What the host does in a step, alone: plans, inputs, tokens read and sorted. No device has a share in it.

    python benchmarks/run_host.py [--sequences 256 512] [--steps 400] [--profile] [--json FILE]

The engine, its scheduler and its buffers are the real ones; what computes a step is left out and gives the same token
each time. Three kinds of steps: all sequences decode ("decode"), all but an eighth of them decode while the others
come and go with prompts of 256 tokens ("mixed"), and all come and go with the lengths of the mix "chat" of `mii bench
offline`. Processor time, so that other programs on the machine hardly count; a GPU hides all of it as long as it is
less than the GPU's own time for a step.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import itertools
import pstats
import random
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mii.batching.data_classes import EngineRequest
from mii.batching.scheduler import Plan
from mii.benchmark.limits import describe_machine
from mii.benchmark.random_checkpoint import RandomCheckpoint
from mii.benchmark.report import versions, write_json
from mii.benchmark.shapes import MIXES
from mii.config import ModelConfig
from mii.engine import Engine, build_engine
from mii.engine.graphs import graph_bucket
from mii.engine.runner import LaunchedStep, Runner
from mii.logging import set_level

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
PROMPT, SHORT_PROMPT, TOKEN = 256, 16, 7
KINDS = ("decode", "mixed", "chat")


def host_engine(sequences: int) -> Engine:
    """An engine whose steps compute nothing; like on a GPU, it is one step ahead of the tokens."""
    manager = {
        "max_ragged_batch_size": 8192,
        "max_ragged_sequence_count": sequences,
        "memory_config": {"mode": "allocate", "size": sequences * 40},
    }
    config = ModelConfig(
        model_name_or_path="host", device="cpu", block_size=64, inference_engine_config={"state_manager": manager}
    )
    engine = build_engine(config, RandomCheckpoint(SHAPE, torch.device("cpu")), progress=False)
    runner = engine.runner
    assert runner is not None
    runner.launch = _without_device(runner)  # type: ignore[method-assign]
    engine._overlapped = True
    return engine


def _without_device(runner: Runner) -> Callable[[Plan], LaunchedStep]:
    tokens = torch.full((runner.limits.max_sequences,), TOKEN, dtype=torch.int32)

    def launch(plan: Plan) -> LaunchedStep:
        runner._fill(plan)
        bucket = graph_bucket(runner._bucket(plan), runner.limits.max_sequences, runner.limits.max_tokens)
        runner._views(bucket, bucket.sequences).step.upload()
        runner._send_suppressed(plan)
        return LaunchedStep(plan, tokens, None)

    return launch


class Load:
    """Keeps an engine full: so many sequences that decode for ever, and so many that come and go.

    Args:
        engine: What is kept full.
        steady: Sequences that decode for ever.
        passing: Others.
        lengths: Draws the prompt and the answer of each of these.
    """

    def __init__(
        self, engine: Engine, steady: int, passing: int, lengths: Callable[[random.Random], tuple[int, int]]
    ) -> None:
        self.engine = engine
        self._uids = itertools.count()
        self._random, self._lengths = random.Random(0), lengths
        self._ids = [self._random.randrange(10, 1000) for _ in range(1 << 16)]
        self._passing: set[int] = set()
        for _ in range(steady):
            self._add(SHORT_PROMPT, 2000)
        for _ in range(passing):
            self._start()

    def _add(self, prompt: int, answer: int) -> int:
        uid = next(self._uids)
        start = self._random.randrange(len(self._ids) - prompt)
        request = EngineRequest(
            uid=uid, prompt_ids=self._ids[start : start + prompt], max_new_tokens=answer, stop_ids=(2,)
        )
        self.engine.add_request(request)
        return uid

    def _start(self) -> None:
        self._passing.add(self._add(*self._lengths(self._random)))

    def step(self) -> None:
        for output in self.engine.step().others:
            if output.finish_reason is not None and output.uid in self._passing:
                self._passing.remove(output.uid)
                self._start()


def load(engine: Engine, kind: str, sequences: int) -> Load:
    """The engine's load, past its beginning."""
    passing = {"decode": 0, "mixed": sequences // 8, "chat": sequences}[kind]
    lengths = MIXES["chat"].lengths if kind == "chat" else lambda _: (PROMPT, 4)
    made = Load(engine, sequences - passing, passing, lengths)
    for _ in range(300 if kind == "chat" else 20):
        made.step()
    return made


def measure(kind: str, sequences: int, steps: int, profile: bool) -> dict[str, Any]:
    engine = host_engine(sequences)
    running = load(engine, kind, sequences)
    gc.collect()
    gc.freeze()  # as an engine's process does
    seconds = []
    profiler = cProfile.Profile()
    for _ in range(steps):
        begin = time.process_time()
        profiler.runcall(running.step) if profile else running.step()
        seconds.append(time.process_time() - begin)
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(14)
    gc.unfreeze()
    engine.destroy()
    seconds.sort()
    return {
        "kind": kind,
        "sequences": sequences,
        "ms_per_step": 1e3 * seconds[steps // 2],
        "ms_mean": 1e3 * sum(seconds) / steps,
        "ms_best": 1e3 * seconds[0],
        "ms_worst": 1e3 * seconds[-1],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures what the host does in a step.")
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 64, 256, 512], metavar="N")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--profile", action="store_true", help="say where the time goes (and take longer)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    set_level("warning")
    rows = []
    for kind, sequences in itertools.product(args.kinds, args.sequences):
        rows.append(measure(kind, sequences, args.steps, args.profile))
        row = rows[-1]
        times = f"{row['ms_per_step']:.3f} ms a step (best {row['ms_best']:.3f}, mean {row['ms_mean']:.3f})"
        print(f"{kind:<7} {sequences:4} sequences: {times}", flush=True)
    if args.json is not None:
        report = {"benchmark": "host", "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        write_json(
            report | {"machine": describe_machine(torch.device("cpu")), "versions": versions(), "rows": rows}, args.json
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
