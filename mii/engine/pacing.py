"""What a model's steps cost on its device, measured in a fraction of a second when an engine starts."""

from __future__ import annotations

import time

import torch

from mii.batching.pace import StepCosts
from mii.engine.costs import count_expert_weights, count_weights
from mii.engine.graphs import Bucket
from mii.engine.runner import Runner
from mii.ops.all_reduce import of_first

MANY_TOKENS = {"cuda": 2048, "cpu": 64}  # enough for products to be limited by arithmetic


def measure_costs(runner: Runner, rounds: int = 3) -> StepCosts:
    """Times steps of one token and of many, with nobody in them; attention follows from the rates that they reach.

    Ranks take these steps together, and all of them go by what rank 0 has found, so that they come to the same plans.

    Args:
        runner: It has its cache.
        rounds: Runs of each, of which the fastest counts.
    """
    limits, spec = runner.limits, runner.spec
    tokens = min(MANY_TOKENS[runner.device.type], limits.max_tokens)
    step = _seconds(runner, Bucket(1, 1, decodes=True), rounds)
    token = _seconds(runner, Bucket(tokens, min(64, limits.max_sequences)), rounds) / tokens
    experts = count_expert_weights(spec)  # nobody is in these steps, so experts had no rows
    weights = count_weights(spec) - experts
    bandwidth, arithmetic = weights * runner.dtype.itemsize / step, 2 * weights / token
    if spec.experts is not None:
        met = experts * spec.experts.top_k / spec.experts.count  # by a token
        step += met * runner.dtype.itemsize / bandwidth
        token += 2 * met / arithmetic
    context, pair = spec.kv_bytes_per_token(runner.dtype.itemsize) / bandwidth, 4 * spec.num_layers * spec.q_size
    found = (step, token, context, pair / arithmetic)
    return StepCosts(*of_first(runner.model.place.group, found, runner.device))


def _seconds(runner: Runner, bucket: Bucket, rounds: int) -> float:
    runner.rehearse(bucket)
    times = []
    for _ in range(rounds):
        _wait(runner.device)
        begin = time.perf_counter()
        runner.rehearse(bucket)
        _wait(runner.device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
