"""The graphs of all steps, captured when an engine starts, and the memory that they and the first steps take.

A graph holds the addresses of the KV cache, and how large the cache may be depends on what the graphs take. So their
share is found out first: with a cache of one block, the largest step runs once, which loads kernels and makes the
products' workspaces, and a few graphs are captured and weighed. Then the cache is made, and the graphs for good.

Ranks do all of this together, in the same order, and stop when rank 0's time is up: steps that are run before they are
captured add up over the ranks.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mii.engine.graphs import Bucket, StepGraphs, all_buckets
from mii.engine.runner import Runner
from mii.ops.all_reduce import of_first
from mii.ops.shard_sampler import Draws

AMONG_RANKS = os.environ.get("MII_CAPTURE_RANKS", "") == "1"
"""Whether ranks capture at the start too; else a step is captured when it comes by for the second time."""
_WEIGHED = 4  # graphs that are captured to see what one takes
_LEAST_BYTES = 256 << 10  # of a graph: a driver that hands out memory in larger pieces shows nothing for some


@dataclass(frozen=True, slots=True)
class Captured:
    """What came of capturing: how many graphs of how many, in how many seconds."""

    graphs: int
    planned: int
    seconds: float


def graph_memory(runner: Runner, free_memory: Callable[[], int]) -> int:
    """Bytes to leave for the graphs, once everything else that steps make on first use has been made.

    Args:
        runner: It has no cache yet, and afterwards none that can be used.
        free_memory: Bytes free on the device.
    """
    limits = runner.limits
    runner.make_cache(1)
    runner.rehearse(Bucket(limits.max_tokens, limits.max_sequences))
    buckets = all_buckets(limits.max_sequences, runner.most_captured)
    weighed = buckets[-_WEIGHED:]
    for bucket in weighed:
        runner.rehearse(bucket)
    before = free_memory()
    for bucket in weighed:
        runner.rehearse(bucket, capture=True)
    each = max(_LEAST_BYTES, (before - free_memory()) // len(weighed))
    runner.graphs = StepGraphs(runner.device)
    torch.cuda.empty_cache()  # what loading left over counts as free
    return each * len(buckets) * len(runner.sampler.usual)


def capture_steps(runner: Runner, seconds: float) -> Captured:
    """Captures the graphs of decode steps, then of mixed ones, until all are there or the time is up.

    Every number of rows runs once before it is captured. Of several ranks the first one's clock counts.
    """
    assert runner.graphs is not None
    buckets = all_buckets(runner.limits.max_sequences, runner.most_captured)
    begin = time.monotonic()
    ran: set[tuple[int, Draws | None]] = set()
    kinds = runner.sampler.usual
    for bucket, draws in itertools.product(buckets, kinds):
        if _of_first(runner, time.monotonic() - begin) > seconds:
            break
        _capture(runner, bucket, draws, ran)
    return Captured(len(runner.graphs), len(buckets) * len(kinds), time.monotonic() - begin)


def _of_first(runner: Runner, seconds: float) -> float:
    return of_first(runner.model.place.group, [seconds], runner.device)[0]


def _capture(runner: Runner, bucket: Bucket, draws: Draws | None, ran: set[tuple[int, Draws | None]]) -> None:
    rows = {(size, draws) for size in bucket[:2]}
    if not rows <= ran:
        runner.rehearse(bucket, draws)
        ran |= rows
    runner.rehearse(bucket, draws, capture=True)
