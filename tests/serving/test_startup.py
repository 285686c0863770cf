"""What a user sees while a deployment starts."""

from __future__ import annotations

import io

import pytest

from mii.backend.startup import describe, startup_view
from mii.launch.process import Failed, Progress, Ready
from mii.launch.state import Part


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Progress("weights", 0, 999, "B"), "weights 0 B of 999 B"),
        (Progress("weights", 120_000_000, 269_060_000, "B"), "weights 120 MB of 269 MB"),
        (Progress("weights", 1.5e9, 140e9, "B"), "weights 1.5 GB of 140.0 GB"),
        (Progress("graphs", 3, 20, "graph"), "graphs 3 graph of 20 graph"),
        (Progress("tokenizer"), "tokenizer"),
        (Ready({"grpc": 50050}), "ready: grpc on port 50050"),
        (Ready(), "ready"),
        (Failed("why"), ""),
    ],
)
def test_what_a_process_says_becomes_words(message: Progress | Ready | Failed, text: str) -> None:
    assert describe(message) == text


def test_without_a_terminal_there_is_a_line_for_each_stage_and_none_for_each_step() -> None:
    stream = io.StringIO()
    view = startup_view(None, stream)
    for done in range(100):
        view.show(Part("engine", Progress("weights", done, 100, "B")))
    view.show(Part("engine", Progress("KV cache")))
    view.show(Part("engine", Ready({"grpc": 1})))
    view.note("done")
    view.close()
    lines = [line.split(" s  ", 1)[1] for line in stream.getvalue().splitlines()]
    assert lines == ["engine: weights 0 B of 100 B", "engine: KV cache", "engine: ready: grpc on port 1", "done"]


def test_on_a_terminal_each_process_has_a_row_that_is_gone_at_the_end() -> None:
    stream = Terminal()
    view = startup_view(None, stream)
    view.show(Part("balancer", Ready({"grpc": 1})))
    view.show(Part("engine", Progress("weights [x]", 50, 100, "B")))
    view.note("deployment [demo] is ready")
    view.close()
    shown = stream.getvalue()
    assert "balancer" in shown and "weights [x] 50 B of 100 B" in shown
    assert "deployment [demo] is ready" in shown


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_it_can_be_turned_off(stream: io.StringIO) -> None:
    view = startup_view(False, stream)
    view.show(Part("engine", Progress("weights", 1, 2, "B")))
    view.note("done")
    view.close()
    assert stream.getvalue() == ""
