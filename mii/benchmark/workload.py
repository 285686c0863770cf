"""Requests in, seconds out: drives an engine with token ids, so that no tokenizer has a share in the figures."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mii.batching.data_classes import EngineRequest
from mii.benchmark.shapes import Job
from mii.engine import Engine
from mii.parallel.engines import FirstEngine

_uids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Run:
    """One workload from the first request given to the last token read."""

    seconds: float
    first_token_seconds: float
    prompt_tokens: int
    answer_tokens: int
    steps: int


def run_jobs(engine: Engine | FirstEngine, jobs: Sequence[Job]) -> Run:
    """Gives all requests at once, greedy and without an end of text, and steps until the last token is there.

    Raises:
        RuntimeError: The engine ended a request early or with an error: the figure would be wrong.
    """
    gc.collect()
    gc.freeze()  # as an engine's process does: a collection would look at all that was ever imported
    wanted = {next(_uids): job for job in jobs}
    left = {uid: job.new_tokens for uid, job in wanted.items()}
    first, steps = 0.0, 0
    begin = time.perf_counter()
    for uid, job in wanted.items():
        engine.add_request(EngineRequest(uid=uid, prompt_ids=job.prompt_ids, max_new_tokens=job.new_tokens))
    while engine.has_work:
        outputs = engine.step()
        steps += 1
        if outputs and not first:
            first = time.perf_counter() - begin
        for output in outputs:
            left[output.uid] -= len(output.token_ids)
            if output.error is not None:
                raise RuntimeError(f"request {output.uid} ended with an error: {output.error}")
    seconds = time.perf_counter() - begin
    gc.unfreeze()
    if any(left.values()):
        raise RuntimeError(f"{sum(1 for n in left.values() if n)} of {len(left)} requests ended before their length")
    answer = sum(job.new_tokens for job in jobs)
    return Run(seconds, first, sum(len(job.prompt_ids) for job in jobs), answer, steps)
