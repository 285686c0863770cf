"""Recorded steps: replays compute what the body would, and a body that is not all native is never recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from mii.ops import native
from mii.ops.activation import activation
from mii.ops.linear import linear, pack_linear
from mii.ops.norm import norm
from mii.ops.recording import RecordedSteps, record

pytestmark = pytest.mark.skipif(
    native.library(torch.device("cpu")) is None, reason="the native library is not built: python setup.py build_native"
)


def make_body() -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    """(input, output, a body of three native calls from one to the other)."""
    x, hidden, out = torch.zeros(3, 32), torch.zeros(3, 32), torch.zeros(4, 16)
    weight, scale = pack_linear(torch.randn(16, 32)), torch.ones(32)

    def body() -> None:
        norm(hidden, x, scale, eps=1e-5)
        activation(hidden, hidden, "silu", gated=False)
        linear(out[:3], hidden, weight)

    return x, out, body


def test_a_replay_reads_what_lies_in_memory_now() -> None:
    x, out, body = make_body()
    steps = RecordedSteps()
    for turn in range(4):
        x.normal_()
        out.zero_()
        steps.run("key", body)
        mine = out.clone()
        body()
        assert torch.equal(mine, out)
        assert mine[:3].count_nonzero()
        assert len(steps) == (turn >= 1)


def test_a_replay_does_not_call_the_body() -> None:
    _, _, body = make_body()
    steps, calls = RecordedSteps(), []

    def counted() -> None:
        calls.append(1)
        body()

    for _ in range(5):
        steps.run((1, 2), counted)
    assert len(calls) == 2


def test_keys_are_recorded_apart_and_the_oldest_goes_first() -> None:
    steps, bodies = RecordedSteps(most=2), [make_body() for _ in range(3)]
    for _ in range(3):
        for key, (x, out, body) in enumerate(bodies):
            x.normal_()
            out.zero_()
            steps.run(key, body)
            mine = out.clone()
            body()
            assert torch.equal(mine, out)
    assert len(steps) <= 2


@pytest.mark.parametrize(
    "extra",
    [
        lambda x: x.add_(1),
        lambda x: x + 1,
        lambda x: torch.empty(3),
        lambda x: x[0, 0].item(),
        lambda x: x.copy_(x * 2),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.t().reshape(-1),
    ],
    ids=["in place", "sum", "allocation", "read", "copy", "index", "reshape that copies"],
)
def test_a_body_that_computes_in_torch_is_not_recorded_but_runs(extra: Callable[[torch.Tensor], object]) -> None:
    x, out, body = make_body()

    def mixed() -> None:
        body()
        extra(x)

    with torch.inference_mode():
        assert record(mixed) is None
    assert len(out)
    steps, calls = RecordedSteps(), []
    for _ in range(4):
        steps.run("key", lambda: (calls.append(1), mixed())[1])
    assert len(calls) == 4
    assert len(steps) == 0


def test_a_body_in_plain_torch_is_not_recorded() -> None:
    _, _, body = make_body()
    with native.reference_ops():
        assert record(body) is None


def test_views_do_not_hinder_a_recording() -> None:
    x, _, body = make_body()

    def viewing() -> None:
        body()
        x[1:].view(-1)[3:].unflatten(0, (-1, 1)).t()

    with torch.inference_mode():
        assert record(viewing) is not None


def test_calls_of_other_threads_are_not_recorded() -> None:
    _, _, body = make_body()
    _, _, other = make_body()

    def body_beside_another() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        body()

    recording, alone = record(body_beside_another), record(body)
    assert recording is not None
    assert alone is not None
    assert len(recording) == len(alone)


def test_nothing_is_recorded_after_a_body_that_failed() -> None:
    def failing() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        record(failing)
    assert native.recorders.current is None


def test_a_failing_call_of_a_replay_raises_with_its_reason() -> None:
    _, _, body = make_body()
    recording = record(body)
    assert recording is not None
    recording._structs[0].dtype = 9
    with pytest.raises(native.NativeError, match="dtype codes"):
        recording.replay()
