"""Step preparation on the card, over the grid of tests/ops/test_prepare.py, and the staging of its inputs."""

from __future__ import annotations

import pytest
import torch

from mii.ops import prepare as prepare_module
from mii.ops.prepare import prepare
from tests.ops.kernel_checks import kernels_only
from tests.ops.test_prepare import CASES, OUTPUTS, Case, Plan, allocate, check_kernel, check_outputs, fill


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_a_plain_loop(name: str) -> None:
    check_kernel("cuda", CASES[name])


def test_the_next_step_is_filled_in_while_this_one_still_waits_in_the_stream() -> None:
    case = Case(32, 256, (1,) * 20 + (100,))
    step = allocate(case, "cuda")
    plans: list[Plan] = []
    results: list[dict[str, torch.Tensor]] = []
    for seed in range(6):
        plans.append(fill(case, step, seed))
        torch.cuda._sleep(20_000_000)  # some ten milliseconds: the copy of this step is still to come
        step.upload()
        with kernels_only(prepare_module):
            prepare(step, case.block_size)
        results.append({name: getattr(step, name).clone() for name in OUTPUTS})
    for plan, result in zip(plans, results, strict=True):
        check_outputs(result, plan)


def test_one_captured_graph_serves_steps_of_every_length() -> None:
    steps = [Case(32, 256, lengths) for lengths in ((1,) * 32, (200, 1, 1), (), (7,), (1,) * 3)]
    step = allocate(max(steps, key=lambda case: case.max_blocks), "cuda")
    prepare(step, steps[0].block_size)  # loads the kernel: nothing of that may happen while capturing
    graph = torch.cuda.CUDAGraph()
    with kernels_only(prepare_module), torch.cuda.graph(graph):
        prepare(step, steps[0].block_size)
    for seed, case in enumerate(steps):
        plan = fill(case, step, seed)
        step.upload()
        graph.replay()
        check_outputs({name: getattr(step, name) for name in OUTPUTS}, plan)
