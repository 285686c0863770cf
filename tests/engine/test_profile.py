"""profile_model_time and sync_debug say how long steps take."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mii.logging import logger
from tests.oracle import generate, random_prompts, small_engine


def test_profile_model_time_logs_averages_every_hundred_steps(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = small_engine(tiny_llama, profile_model_time=True)
    logger.addHandler(caplog.handler)
    try:
        generate(engine, random_prompts(engine.vocab_size, [4]), 205)
    finally:
        logger.removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records if "ms a step" in record.getMessage()]
    assert len(lines) == 2
    assert lines[0].endswith("over 100 steps")


def test_sync_debug_logs_every_step(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = small_engine(tiny_llama, sync_debug=True)
    logger.addHandler(caplog.handler)
    before = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        generate(engine, random_prompts(engine.vocab_size, [4]), 7)
    finally:
        logger.setLevel(before)
        logger.removeHandler(caplog.handler)
    assert sum("step: 1 tokens in" in record.getMessage() for record in caplog.records) == 7
