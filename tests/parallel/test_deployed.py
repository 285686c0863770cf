"""How the ranks of a replica that is divided over hosts find the first one, whatever an earlier one has left."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from mii.backend.ports import is_free
from mii.errors import LauncherError
from mii.launch.state import write_private
from mii.parallel import deployed
from mii.parallel.deployed import address_towards
from tests.serving.deployments import free_port


def find_later(note: Path) -> tuple[list[Any], threading.Thread]:
    """What another rank finds, once it has."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(deployed._reach_store(note, 2)))
    thread.start()
    return found, thread


@pytest.mark.parametrize("left", ["", "nobody answers", "somebody else answers"])
def test_a_rank_takes_the_store_of_the_first_rank_that_lives(tmp_path: Path, left: str) -> None:
    note = tmp_path / "meeting"
    other = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    other.set(deployed._WORD, "another word")
    if left:
        port = other.port if left == "somebody else answers" else free_port()
        write_private(note, f"127.0.0.1 {port} word".encode())
    found, thread = find_later(note)
    thread.join(0.5)
    assert not found
    mine = deployed._announce_store(note, 2, "127.0.0.1")
    mine.set("said", "by the first")
    thread.join(60)
    assert found, "the store of the first rank was not found"
    store, host = found[0]
    assert host == "127.0.0.1"
    assert store.get("said") == b"by the first"


def test_a_first_rank_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed, "_PATIENCE_SECONDS", 0.1)
    port = free_port()
    assert is_free(port)
    write_private(tmp_path / "meeting", f"127.0.0.1 {port} word".encode())
    with pytest.raises(LauncherError, match=rf"the first rank, at port {port} of 127\.0\.0\.1, cannot be reached from"):
        deployed._reach_store(tmp_path / "meeting", 2)


def test_the_address_on_the_way_to_a_host_is_that_hosts_network() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(LauncherError, match=r"no way to host 'no such host'.*give an address or a name"):
        address_towards("no such host")
