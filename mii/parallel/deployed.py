"""The ranks of a replica in a deployment: processes of one machine, which meet through the deployment's folder.

Rank 0 opens torch's store on a free port and leaves a note of it; a note of a process that has died is not believed, so
ranks that are started again all meet the new one.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch._C._distributed_c10d import TCPStore

from mii.engine import build_engine
from mii.launch.state import start_ticks, write_private
from mii.modeling.checkpoint import open_checkpoint
from mii.parallel.engines import FirstEngine, OtherEngine
from mii.parallel.ranks import Ranks, own_device

if TYPE_CHECKING:
    from mii.launch.process import Process

__all__ = ["load_part"]

_HERE = "127.0.0.1"
_LOOK_SECONDS = 0.05
_MEET_SECONDS = timedelta(days=1)  # the supervisor ends those who wait for one that has died


def load_part(process: Process) -> FirstEngine | OtherEngine:
    """This rank's part of the model, once all ranks have theirs.

    Raises:
        mii.errors.LauncherError, mii.errors.LoadError: a rank cannot load its part, or the ranks do not fit together.
    """
    config = process.model_config
    process.report("waiting for the other ranks")
    size, run = config.tensor_parallel, process.folder.run
    note = run / f"replica-{process.replica}-ranks"
    store = _open_store(note, size) if process.rank == 0 else _find_store(note, size)
    listen = f"ipc://{run / f'replica-{process.replica}-steps'}"
    ranks = Ranks(store, process.rank, size, own_device(config), listen=listen)
    process.report("opening the checkpoint")
    model, revision, trust = config.model_name_or_path, config.revision, config.trust_remote_code
    with ranks.loading(), open_checkpoint(model, revision=revision, trust_remote_code=trust) as checkpoint:
        part = build_engine(config, checkpoint, config.progress, ranks)
    assert isinstance(part, FirstEngine | OtherEngine)
    return part


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
