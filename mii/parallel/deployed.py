"""The ranks of a replica in a deployment. On one machine they meet through the deployment's folder for sockets, over
several hosts through its own folder, which all of them see.

Rank 0 opens torch's store on a free port and leaves a note of it. A note of a process that has died is not believed, so
ranks that are started again all meet the new one: on one machine the process is looked for, over several hosts
nobody answers at that port, or not with the word that the note has.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch._C._distributed_c10d import TCPStore

from mii.config.model import is_this_host
from mii.engine import build_engine
from mii.errors import LauncherError
from mii.launch.state import start_ticks, write_private
from mii.modeling.checkpoint import open_checkpoint
from mii.parallel.engines import FirstEngine, OtherEngine
from mii.parallel.ranks import Ranks, own_device

if TYPE_CHECKING:
    from mii.launch.process import Process

__all__ = ["address_towards", "load_part"]

_HERE = "127.0.0.1"
_LOOK_SECONDS = 0.05
_MEET_SECONDS = timedelta(days=1)  # the supervisor ends those who wait for one that has died
_KNOCK_SECONDS = timedelta(seconds=2)
_PATIENCE_SECONDS = 30.0  # for a first rank that has left a note and cannot be reached
_WORD = "word"


def load_part(process: Process) -> FirstEngine | OtherEngine:
    """This rank's part of the model, once all ranks have theirs.

    Raises:
        mii.errors.LauncherError, mii.errors.LoadError: a rank cannot load its part, or the ranks do not fit together.
    """
    config = process.model_config
    process.report("waiting for the other ranks")
    device = own_device(config)
    ranks = _over_hosts(process, device) if process.replica_config.rank_hosts else _on_one_host(process, device)
    process.report("opening the checkpoint")
    model, revision, trust = config.model_name_or_path, config.revision, config.trust_remote_code
    with ranks.loading(), open_checkpoint(model, revision=revision, trust_remote_code=trust) as checkpoint:
        part = build_engine(config, checkpoint, config.progress, ranks)
    assert isinstance(part, FirstEngine | OtherEngine)
    return part


def _on_one_host(process: Process, device: Any) -> Ranks:
    size, run = process.model_config.tensor_parallel, process.folder.run
    note = run / f"replica-{process.replica}-ranks"
    store = _open_store(note, size) if process.rank == 0 else _find_store(note, size)
    return Ranks(store, process.rank, size, device, listen=f"ipc://{run / f'replica-{process.replica}-steps'}")


def _over_hosts(process: Process, device: Any) -> Ranks:
    size, note = process.model_config.tensor_parallel, process.folder.meeting_file(process.replica)
    if process.rank == 0:
        address = _first_address(process)
        store, host = _announce_store(note, size, address), address
    else:
        store, host = _reach_store(note, size)
        address = address_towards(host)
    return Ranks(store, process.rank, size, device, host=host, address=address)


def _first_address(process: Process) -> str:
    """By which ranks on other hosts reach the first one: its name in the hostfile or, where that says nothing to them,
    this host's address on the way to another one.
    """
    replica = process.replica_config
    if process.is_elsewhere:
        return replica.hostname
    return address_towards(next(host for host in replica.rank_hosts if not is_this_host(host)))


def address_towards(host: str) -> str:
    """This machine's address on the way to a host. Nothing is sent.

    Raises:
        LauncherError: the host's name says nothing here, or there is no way to it.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise LauncherError(
            f"there is no way to host {host!r} from {socket.gethostname()!r}: {error.strerror}; give an address or a "
            "name in the hostfile that every host can find"
        ) from error


def _announce_store(note: Path, size: int, address: str) -> Any:
    store = TCPStore(_HERE, 0, size, True, timeout=_MEET_SECONDS, wait_for_workers=False)
    word = secrets.token_hex(8)
    store.set(_WORD, word)
    write_private(note, f"{address} {store.port} {word}".encode())
    return store


def _reach_store(note: Path, size: int) -> tuple[Any, str]:
    """The store of rank 0 on another host, and that host."""
    tried, deadline = "", 0.0
    while True:
        try:
            found = note.read_text()
        except FileNotFoundError:
            found = ""
        if found != tried:
            tried, deadline = found, time.monotonic() + _PATIENCE_SECONDS
        if found:
            host, port, word = found.split()
            try:
                store = TCPStore(host, int(port), size, False, timeout=_KNOCK_SECONDS, wait_for_workers=False)
                if store.get(_WORD).decode() == word:
                    store.set_timeout(_MEET_SECONDS)
                    return store, host
            except (RuntimeError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise LauncherError(
                        f"the first rank, at port {port} of {host}, cannot be reached from {socket.gethostname()!r}: "
                        f"{str(error).splitlines()[0]}; let connections between the hosts through"
                    ) from error
        time.sleep(_LOOK_SECONDS)


def _open_store(note: Path, size: int) -> Any:
    store = TCPStore(_HERE, 0, size, True, timeout=_MEET_SECONDS, wait_for_workers=False)
    write_private(note, f"{os.getpid()} {start_ticks(os.getpid())} {store.port}".encode())
    return store


def _find_store(note: Path, size: int) -> Any:
    while True:
        try:
            pid, ticks, port = (int(word) for word in note.read_text().split())
        except FileNotFoundError:
            pid = 0
        if pid and start_ticks(pid) == ticks:
            return TCPStore(_HERE, port, size, False, timeout=_MEET_SECONDS, wait_for_workers=False)
        time.sleep(_LOOK_SECONDS)
