"""The CPU library's threads: the same results with any number, from several callers at once, and after a fork."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mii.ops import native
from mii.ops.activation import activation
from mii.ops.linear import LinearWeight, linear, pack_linear

pytestmark = pytest.mark.skipif(
    native.library(torch.device("cpu")) is None, reason="the native library is not built: python setup.py build_native"
)


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product(x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
    out = torch.empty(x.shape[0], weight.out_features)
    linear(out, x, weight)
    activation(out, out, "silu", gated=False)
    return out


def test_any_number_of_threads_gives_the_same_bits() -> None:
    weight, x = pack_linear(torch.randn(700, 300)), torch.randn(40, 300)
    torch.set_num_threads(1)
    expected = product(x, weight)
    for threads in (2, 3, 7, 2):
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(product(x, weight), expected)


def test_callers_on_several_threads_do_not_disturb_each_other() -> None:
    weight = pack_linear(torch.randn(500, 200))
    inputs = [torch.randn(1 + i % 30, 200) for i in range(200)]
    expected = [product(x, weight) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for actual, right in zip(pool.map(lambda x: product(x, weight), inputs), expected, strict=True):
            assert torch.equal(actual, right)


def test_a_forked_child_computes() -> None:
    script = """
import os, torch
from mii.ops.linear import linear, pack_linear
torch.set_num_threads(2)
weight, x = pack_linear(torch.randn(800, 300)), torch.randn(20, 300)
def product():
    out = torch.empty(20, 800)
    linear(out, x, weight)
    return out
expected = product()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(product(), expected) else 7)
_, status = os.waitpid(child, 0)
assert torch.equal(product(), expected)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
