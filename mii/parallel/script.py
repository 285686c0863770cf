"""`mii.pipeline` in a script that a launcher started in several processes."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
from contextlib import suppress

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from mii.config import ModelConfig
from mii.errors import LauncherError, MIIError
from mii.logging import logger
from mii.parallel.environment import Launch, read_launch, told_by_first
from mii.parallel.ranks import Ranks, own_device

__all__ = ["join"]

_PATIENCE_SECONDS = 10.0
_WAITING = (
    "rank %d still waits for the others of %d ranks at %s:%d (WORLD_SIZE, MASTER_ADDR, MASTER_PORT); where no launcher "
    "has started them, end this and unset WORLD_SIZE"
)
_groups = itertools.count()  # every rank makes the same groups in the same order


def join(config: ModelConfig, *, keeps: bool) -> Ranks:
    """Meets the other processes of this script.

    Args:
        config: of the model.
        keeps: whether ranks other than the first get the answers too.

    Raises:
        LauncherError: what launchers set is not there, the ranks cannot meet, or one has no device.
    """
    try:
        launch = read_launch()
        device = own_device(config)
        _share_cores(launch)
        _initialise(launch, device)
    except MIIError as error:
        raise told_by_first(error) from None
    store = PrefixStore(f"mii-{next(_groups)}", _get_default_store())
    return Ranks(store, launch.rank, launch.size, device, host=launch.address[0], keeps=keeps)


def _share_cores(launch: Launch) -> None:
    """Ranks of one machine share its cores; some launchers give every one of them all."""
    if launch.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))


def _initialise(launch: Launch, device: torch.device | MIIError) -> None:
    """torch.distributed's default group, which scripts may use and mii takes its store from. It stays afterwards."""
    if dist.is_initialized():
        return
    cuda = isinstance(device, torch.device) and device.type == "cuda"
    host, port = launch.address
    if host in ("127.0.0.1", "localhost") and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # gloo asks for this machine's name, which not every container knows
    waiting = threading.Timer(_PATIENCE_SECONDS, logger.warning, (_WAITING, launch.rank, launch.size, host, port))
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LauncherError(
            f"the {launch.size} ranks cannot meet at {host}:{port} (MASTER_ADDR and MASTER_PORT): {reason}"
        ) from error
    finally:
        waiting.cancel()
    atexit.register(_finish)


def _finish() -> None:
    with suppress(Exception):  # the script has done it
        dist.destroy_process_group()
