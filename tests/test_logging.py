"""The logger: its stream, its format, its level, and that it leaves the root logger alone."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mii.logging import logger, parse_level, set_level


@pytest.fixture(autouse=True)
def level_is_restored() -> Iterator[None]:
    level = logger.level
    yield
    logger.setLevel(level)


def test_lines_go_to_standard_error_with_time_level_and_place(capsys: pytest.CaptureFixture[str]) -> None:
    set_level("info")
    logger.info("weights read: %d MB", 269)
    out, err = capsys.readouterr()
    assert out == ""
    pattern = r"\[[\d-]+ [\d:,]+\] \[INFO\] \[test_logging\.py:\d+:test_lines_go\w+\] weights read: 269 MB\n"
    assert re.fullmatch(pattern, err)


def test_the_level_hides_what_is_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    set_level("Warning")
    logger.info("hidden")
    logger.warning("shown")
    assert "hidden" not in (err := capsys.readouterr().err)
    assert "shown" in err


@pytest.mark.parametrize(("given", "number"), [("debug", 10), (" ERROR ", 40), (15, 15), ("20", 20)])
def test_levels_are_names_in_any_case_or_numbers(given: str | int, number: int) -> None:
    assert parse_level(given) == number


def test_an_unknown_level_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'loud' is not a log level; use one of debug, info"):
        set_level("loud")


def run_with_level(level: str) -> str:
    code = "import logging; root = list(logging.root.handlers), logging.root.level\n"
    code += "from mii.logging import logger; logger.info('an info'); logger.warning('a warning')\n"
    code += "assert root == (list(logging.root.handlers), logging.root.level)"
    environment = os.environ | {"MII_LOG_LEVEL": level}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    return run.stderr


def test_the_environment_sets_the_level_and_the_root_logger_is_not_touched() -> None:
    assert "an info" in run_with_level("")
    quiet = run_with_level("warning")
    assert "an info" not in quiet
    assert "a warning" in quiet


def test_a_wrong_level_in_the_environment_is_reported_and_does_not_stop_the_import() -> None:
    assert "MII_LOG_LEVEL: 'loud' is not a log level" in run_with_level("loud")


def test_a_program_that_configures_the_root_logger_sees_no_line_twice(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.root.addHandler(handler)
    try:
        logger.error("once")
    finally:
        logging.root.removeHandler(handler)
    assert capsys.readouterr().err.count("once") == 1
