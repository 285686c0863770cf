"""A registry of its own for each test, and the proof after each that nothing of a deployment is left."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.deployments import StandIns, nothing_left


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that deployments lie under; whatever a test starts must be gone when it ends."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("MII_CACHE_PATH", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked up anew
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # a short path, for sockets
        monkeypatch.setenv("TMPDIR", temporary)
        with nothing_left(folder, Path(temporary)):
            yield folder


@pytest.fixture
def stand_ins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """Deployments start stand-ins, with the behaviour that the test says."""
    return StandIns(monkeypatch)
