"""The figures of a benchmark and how each is measured.

Decoding: the time of a run of 272 tokens minus that of a run of 16, over the 256 tokens between them, so that prompts
and start-up cancel out; the median of three. Throughput: all requests at once, counted tokens over the time of the
whole call, the better of two runs, or one where nothing is to be repeated. Every run has prompts of its own, so nothing
comes from the prefix cache.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mii.benchmark.roofline import Roofline
from mii.benchmark.shapes import MIXES, Job, make_batch, make_mix, with_fresh_ids
from mii.benchmark.workload import Run, run_jobs
from mii.engine import Engine
from mii.engine.timeline import Timeline
from mii.parallel.engines import FirstEngine

PROMPT, SHORT, LONG = 128, 16, 272
_repetition = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `limit` is what the machine allows in the same unit; None where no limit is known."""

    name: str
    value: float
    unit: str
    higher_is_better: bool
    limit: float | None = None
    samples: list[float] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """How much of the limit is reached, 0 to 1."""
        if self.limit is None:
            return None
        return self.value / self.limit if self.higher_is_better else self.limit / self.value

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share}


@dataclass(frozen=True, slots=True)
class Bench:
    """An engine that is ready, and what its machine allows."""

    engine: Engine | FirstEngine
    roofline: Roofline
    repeats: int = 3
    timeline_file: Path | None = None

    @property
    def device(self) -> torch.device:
        assert self.engine.runner is not None
        return self.engine.runner.device

    @property
    def vocab(self) -> int:
        return self.engine.vocab_size

    def run(self, jobs: list[Job]) -> Run:
        """Runs the jobs with tokens that no run before had."""
        return run_jobs(self.engine, with_fresh_ids(jobs, self.vocab, next(_repetition)))


def decode_row(bench: Bench, batch: int) -> Row:
    """Milliseconds of a step in which `batch` sequences of 144 to 400 tokens take part."""
    short = make_batch(batch, PROMPT, SHORT, bench.vocab)
    long = make_batch(batch, PROMPT, LONG, bench.vocab)
    bench.run(short)
    samples = []
    for _ in range(bench.repeats):
        less, more = bench.run(short).seconds, bench.run(long).seconds
        samples.append(1e3 * (more - less) / (LONG - SHORT))
    value = statistics.median(samples)
    limit = 1e3 * bench.roofline.decode_step(batch, PROMPT + (SHORT + LONG) / 2)
    return Row(f"decode-{batch}", value, "ms/step", False, limit, samples, {"tokens_per_s": 1e3 * batch / value})


def throughput_row(
    bench: Bench, name: str, jobs: list[Job], counted: Callable[[Run], int], unit: str, runs: int = 2
) -> Row:
    """Counted tokens a second over the whole call, the best of some runs: as many as the bench repeats at most."""
    bench.run([Job(job.prompt_ids, min(job.new_tokens, 4)) for job in jobs[: max(1, len(jobs) // 8)]])
    results = [bench.run(jobs) for _ in range(min(runs, bench.repeats))]
    samples = [counted(result) / result.seconds for result in results]
    best = max(results, key=lambda result: counted(result) / result.seconds)
    limit = counted(best) / bench.roofline.workload(jobs)
    details = {
        "requests": len(jobs),
        "prompt_tokens": best.prompt_tokens,
        "answer_tokens": best.answer_tokens,
        "seconds": best.seconds,
        "first_token_s": best.first_token_seconds,
        "steps": best.steps,
    }
    return Row(name, max(samples), unit, True, limit, samples, details)


def _all_tokens(run: Run) -> int:
    return run.prompt_tokens + run.answer_tokens


def _answer_tokens(run: Run) -> int:
    return run.answer_tokens


def _prompt_tokens(run: Run) -> int:
    return run.prompt_tokens


# name of a mix: the tokens that count and how that is written
_COUNTED: dict[str, tuple[Callable[[Run], int], str]] = {
    "prefill-2048": (_prompt_tokens, "prompt tokens/s"),
    "fastgen-2600-60": (_all_tokens, "tokens/s"),
    "chat": (_answer_tokens, "answer tokens/s"),
    "decode-128-512": (_answer_tokens, "answer tokens/s"),
    "even-1024-1024": (_all_tokens, "tokens/s"),
    "long-7900-256": (_all_tokens, "tokens/s"),
    "answers-256": (_answer_tokens, "answer tokens/s"),
}


def _mix_row(name: str) -> Callable[[Bench], Row]:
    counted, unit = _COUNTED[name]
    return lambda bench: throughput_row(bench, name, make_mix(name, bench.vocab), counted, unit)


def prompt_row(bench: Bench) -> Row:
    """Prompt tokens a second of one prompt of 512, up to its first token."""
    jobs = make_batch(1, 512, 1, bench.vocab)
    return throughput_row(bench, "prompt-512", jobs, _prompt_tokens, "prompt tokens/s", runs=5)


def batch_row(bench: Bench) -> Row:
    """Answer tokens a second of 16 requests at once, 128 tokens in and 64 out."""
    jobs = make_batch(16, 128, 64, bench.vocab)
    return throughput_row(bench, "batch-16", jobs, _answer_tokens, "answer tokens/s", runs=3)


def host_row(bench: Bench, batch: int, timeline_file: Path | None = None) -> Row:
    """Milliseconds of the host's own work in a step of `batch` sequences that decode, and what the device does."""
    jobs = make_batch(batch, PROMPT, SHORT, bench.vocab)
    bench.run(jobs)
    timeline = Timeline(bench.device)
    bench.engine.record(timeline)
    bench.run(make_batch(batch, PROMPT, LONG, bench.vocab))
    bench.engine.record(None)
    if timeline_file is not None:
        timeline.write(timeline_file)
    found = timeline.summary()
    return Row(f"host-{batch}", found["host_ms"], "ms/step", False, found.get("device_ms"), [], found)


ROWS: dict[str, Callable[[Bench], Row]] = {
    "decode-1": lambda bench: decode_row(bench, 1),
    "decode-8": lambda bench: decode_row(bench, 8),
    "decode-64": lambda bench: decode_row(bench, 64),
    "prompt-512": prompt_row,
    "batch-16": batch_row,
    **{name: _mix_row(name) for name in MIXES},
    "host-256": lambda bench: host_row(bench, 256, bench.timeline_file),
}
_DECODES = ("decode-1", "decode-8", "decode-64")
GPU_ROWS = (*_DECODES, "prefill-2048", "fastgen-2600-60", "chat", "decode-128-512", "host-256")
RANKS_ROWS = (*_DECODES, "fastgen-2600-60", "chat")
"""Of a model that is divided among GPUs."""
CPU_ROWS = ("decode-1", "prompt-512", "batch-16")

_FIRST_TOKEN = """
import sys, time
import mii
pipe = mii.pipeline(sys.argv[1], device=sys.argv[2], progress=False)
pipe(["Once upon a time"], max_new_tokens=1)
print(time.time())
"""


def first_token_row(model: str, device: str, runs: int = 3) -> Row:
    """Seconds from the start of a Python process to the first token of a pipeline on a model file."""
    samples = []
    for _ in range(runs):
        begin = time.time()
        command = [sys.executable, "-c", _FIRST_TOKEN, model, device]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        samples.append(float(done.stdout.split()[-1]) - begin)
    return Row("first-token", statistics.median(samples), "s", False, None, samples, {"model": model})
