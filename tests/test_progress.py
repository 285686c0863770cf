"""Bars of a process without a terminal go where it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mii.progress import progress_bar, report_progress_to


@pytest.fixture
def reports() -> Iterator[list[tuple[str, float, float, str]]]:
    seen: list[tuple[str, float, float, str]] = []
    report_progress_to(lambda *report: seen.append(report))
    yield seen
    report_progress_to(None)


def test_a_bar_is_told_from_nothing_to_its_end_and_draws_nothing(
    reports: list[tuple[str, float, float, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("weights", 10, unit="B", enabled=True) as bar:
        bar.update(4)
        bar.update(6)
    assert reports == [("weights", 0, 10, "B"), ("weights", 4, 10, "B"), ("weights", 10, 10, "B")]
    assert capfd.readouterr().err == ""


def test_without_a_listener_it_is_drawn(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("weights", 2, enabled=True) as bar:
        bar.update(2)
    assert "weights" in capfd.readouterr().err
