"""What is found out about another host before anything is started there: its mii, its view of the folder, its ports."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

import mii
from mii.errors import LauncherError
from mii.launch.reach import check_host


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of ssh: it runs what it is given right here, unless the test writes another one."""
    program = tmp_path / "ssh"
    write(program, 'for last; do :; done; exec sh -c "$last"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


def write(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_a_host_that_has_everything_says_which_ports_are_taken(ssh: Path, tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken, socket.socket() as free:
        free.bind(("0.0.0.0", 0))
        ports = [taken.getsockname()[1], free.getsockname()[1]]
        free.close()
        assert check_host("other", str(tmp_path), ports) == [ports[0]]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo ssh: no route >&2; exit 255",
            "'other' cannot be reached with ssh: ssh: no route; make 'ssh",
        ),
        ("echo sh: not found >&2; exit 127", f"'other' has no {sys.executable}; install Python and mii there"),
        ("echo it burns >&2; exit 3", "Python cannot be run on host 'other': it burns"),
    ],
)
def test_what_ssh_says_is_handed_on(ssh: Path, tmp_path: Path, script: str, message: str) -> None:
    write(ssh, script)
    with pytest.raises(LauncherError, match=message):
        check_host("other", str(tmp_path), [])


def test_a_host_without_mii_or_with_another_version_is_refused(
    ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mii, "__version__", "0.0.7")
        with pytest.raises(LauncherError, match=r"host 'other' has mii .* and this one has 0\.0\.7; install the same"):
            check_host("other", str(tmp_path), [])
    broken = tmp_path / "broken"
    (broken / "mii").mkdir(parents=True)
    (broken / "mii" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'mii'\")")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    with pytest.raises(LauncherError, match=r"on host 'other' has no mii \(No module named 'mii'\); install it there"):
        check_host("other", str(tmp_path), [])


def test_a_host_that_does_not_see_the_folder_is_refused(ssh: Path, tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match="'other' does not see /nowhere; set MII_CACHE_PATH to a folder"):
        check_host("other", "/nowhere", [])
