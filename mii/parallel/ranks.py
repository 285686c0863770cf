"""A group while its model is loaded: the ranks meet, compare what they have, and become engines."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.distributed.distributed_c10d import PrefixStore

from mii.engine.devices import choose_device
from mii.errors import LauncherError, MIIError
from mii.parallel.channel import FirstChannel, OtherChannel
from mii.parallel.engines import FirstEngine, OtherEngine
from mii.parallel.environment import told_by_first
from mii.parallel.fingerprint import digest_of
from mii.parallel.group import Group
from mii.parallel.meeting import meet
from mii.parallel.messages import Hello
from mii.parallel.watch import FirstWatch, OtherWatch

if TYPE_CHECKING:
    from mii.config import ModelConfig
    from mii.engine.engine import Engine
    from mii.modeling.checkpoint import Checkpoint

__all__ = ["Ranks", "own_device"]


def own_device(config: ModelConfig) -> torch.device | MIIError:
    """The device of this rank, which a GPU is current from now on; or why it has none."""
    try:
        device = choose_device(config.device, config.local_device)
    except MIIError as error:
        return error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


class Ranks:
    """This process's place in a group. Made on all ranks at the same time.

    Args:
        store: torch's key-value store, for this group alone.
        rank: which one this is.
        size: how many there are.
        device: where its tensors are; or why it has none.
        listen: where rank 0 listens for the others: a ``tcp://`` or ``ipc://`` address.
        host: the name by which other machines know rank 0's.
        address: by which they reach this rank; empty: found out.
        keeps: see `OtherEngine`.

    Raises:
        LauncherError: a rank has no device.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        device: torch.device | MIIError,
        *,
        listen: str = "",
        host: str = "",
        address: str = "",
        keeps: bool = False,
    ) -> None:
        self.rank, self.size, self._keeps = rank, size, keeps
        reasons = meet(store, rank, size, "device", str(device) if isinstance(device, MIIError) else "")
        for other, reason in enumerate(reasons):
            if reason:
                raise told_by_first(LauncherError(f"rank {other} of {size}: {reason}"))
        assert isinstance(device, torch.device)
        self.group = Group(PrefixStore("numbers", store), rank, size, device, address)
        self._channel: FirstChannel | OtherChannel
        self._watch: FirstWatch | OtherWatch
        if rank:
            self._channel = OtherChannel(rank, store.get("channel").decode())
            self._watch = OtherWatch(rank, size, store.get("watch").decode())
        else:
            self._channel, self._watch = self._listen(store, listen, host)

    def _listen(self, store: Any, listen: str, host: str) -> tuple[FirstChannel, FirstWatch]:
        anywhere = "tcp://127.0.0.1:*" if self.group.is_local else "tcp://0.0.0.0:*"
        channel = FirstChannel(self.size, listen or anywhere)
        watch = FirstWatch(self.size, f"{listen}-watch" if listen else anywhere)
        for name, address in (("channel", channel.address), ("watch", watch.address)):
            store.set(name, address.replace("//0.0.0.0:", f"//{host}:"))
        return channel, watch

    @contextmanager
    def loading(self) -> Iterator[None]:
        """What fails in this block fails on every rank; rank 0 says why."""
        try:
            yield
        except BaseException as error:
            reason = str(error) or type(error).__name__
            if isinstance(self._channel, FirstChannel):
                self._channel.refuse(reason)
            else:
                self._channel.fail(reason)
            self._channel.close()
            self._watch.close()
            self.group.close()
            raise told_by_first(error) from None

    def compare(self, checkpoint: Checkpoint, options: str) -> None:
        """Compares what the ranks have loaded. From here on they take steps together.

        Args:
            checkpoint: the weights.
            options: how the model is run.

        Raises:
            LauncherError: they do not fit together, or one could not load its part.
        """
        from mii import __version__

        versions = f"mii {__version__}, torch {torch.__version__}, {platform.machine()}"
        self._hello = Hello(self.rank, versions, options, digest_of(checkpoint), 0)
        self._channel.settle(self._hello)

    def least_room(self, blocks: int) -> int:
        """The KV blocks that each rank makes: what the one with the least room has room for.

        Args:
            blocks: that this one has room for.

        Raises:
            LauncherError: one of them could not find out.
        """
        return self._channel.settle(msgspec.structs.replace(self._hello, blocks=blocks))

    def engine(self, engine: Engine) -> FirstEngine | OtherEngine:
        """The engine of this rank."""
        if isinstance(self._channel, FirstChannel):
            assert isinstance(self._watch, FirstWatch)
            return FirstEngine(engine, self._channel, self._watch, self.group)
        assert isinstance(self._watch, OtherWatch)
        return OtherEngine(engine, self._channel, self._watch, self.group, keeps=self._keeps)
