"""The timeline of an engine's steps: every step once, its parts in order, a file that can be drawn."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from mii.engine.timeline import PARTS, Timeline
from tests.oracle import generate, random_prompts, small_engine


def test_every_step_is_recorded_with_its_parts(tiny_llama: Path, tmp_path: Path) -> None:
    engine = small_engine(tiny_llama)
    assert engine.runner is not None
    timeline = Timeline(engine.runner.device)
    engine.record(timeline)
    generate(engine, random_prompts(engine.vocab_size, [5, 40, 3]), 6)
    engine.record(None)
    recorded = len(timeline.rows())
    generate(engine, [[5, 6]], 4)
    rows = timeline.rows()
    assert len(rows) == recorded >= 7
    assert sum(row["tokens"] for row in rows) == 5 + 40 + 3 + 3 * 5
    for row in rows:
        assert all(row[f"{name}_ms"] >= 0 for name in PARTS)
        assert abs(row["host_ms"] - sum(row[f"{name}_ms"] for name in PARTS if name != "wait")) < 1e-6
    timeline.write(tmp_path / "steps.json")
    report = json.loads((tmp_path / "steps.json").read_text())
    bars = [event for event in report["traceEvents"] if event["ph"] == "X"]
    assert len(bars) == len(PARTS) * recorded
    assert all(before["ts"] + before["dur"] <= after["ts"] + 1e-3 for before, after in itertools.pairwise(bars))
    assert report["summary"]["steps"] == recorded
    assert {f"{name}_ms" for name in PARTS} < set(report["summary"])
    engine.destroy()


def test_no_more_steps_than_asked_for_are_kept(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama)
    assert engine.runner is not None
    timeline = Timeline(engine.runner.device, most=3)
    engine.record(timeline)
    generate(engine, [[5, 6, 7]], 8)
    assert len(timeline.rows()) == 3
    engine.destroy()
