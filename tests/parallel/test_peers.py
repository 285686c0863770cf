"""How ranks come to share the memory of their GPUs, or do without; what they add up in it is in tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

from mii.logging import logger
from mii.ops import native
from mii.parallel import peers
from mii.parallel.copies import LEAST_BYTES, PLACE_BYTES, Copies
from mii.parallel.group import MOST_ALONE, Group
from mii.parallel.peers import MOST_BYTES, PeerMemory, open_peers
from tests.parallel.threads import on_threads


class Memory(PeerMemory):
    """Without a GPU: what is done with it is written down."""

    fails_to = ""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device, self.num_bytes = rank, size, device, 0
        self.copies = object.__new__(Copies) if size == 2 else None
        self.done: list[str] = []
        made.append(self)

    @property
    def handle(self) -> str:
        return f"handle of {self.rank}"

    def open(self, handles: list[str]) -> None:
        self._do("open")
        assert handles == [f"handle of {rank}" for rank in range(self.size)]

    def try_out(self) -> None:
        self._do("try out")

    def try_copies(self) -> None:
        self._do("try copies")

    def check_lost(self) -> None:
        self._do("check lost")

    def close(self, store: object) -> None:
        self.done.append("close")

    def _do(self, what: str) -> None:
        self.done.append(what)
        if self.rank == 1 and what in self.fails_to.split(", "):
            raise native.NativeError("CUDA error 217 (peer access is not supported between these two devices)")


made: list[Memory] = []


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    made.clear()
    monkeypatch.setattr(peers, "ASKED_FOR", True)
    monkeypatch.setattr(peers, "PeerMemory", Memory)
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


def opened(size: int, is_local: bool = True) -> list[PeerMemory | None]:
    store = dist.HashStore()
    return on_threads(size, lambda rank: open_peers(store, rank, size, torch.device("cpu"), is_local))


def test_all_ranks_open_and_try_each_others_memory(caplog: pytest.LogCaptureFixture) -> None:
    assert {memory.rank for memory in opened(3) if memory is not None} == {0, 1, 2}
    assert all(memory.done == ["open", "try out"] for memory in made)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("what", ["open", "try out"])
def test_what_one_rank_cannot_do_none_does_and_it_is_said_once(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Memory, "fails_to", what)
    assert opened(3) == [None, None, None]
    assert all(memory.done[-1] == "close" for memory in made)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "NCCL adds up what the ranks compute (rank 1: CUDA error 217 (peer access is not supported" in warning


def test_without_copies_sums_in_memory_remain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Memory, "fails_to", "try copies")
    found = [memory for memory in opened(2) if memory is not None]
    assert [memory.copies for memory in found] == [None, None]
    assert [memory.done[-1] for memory in found] == ["check lost"] * 2
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "while nothing else is computed (rank 1: CUDA error 217" in warning


def test_nothing_remains_where_a_rank_was_given_up_meanwhile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Memory, "fails_to", "try copies, check lost")
    assert opened(2) == [None, None]
    assert all(memory.done[-1] == "close" for memory in made)
    assert "NCCL adds up" in caplog.text


def test_a_rank_without_memory_keeps_the_others_from_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peers, "PeerMemory", PeerMemory)  # the real one, for which there is no GPU here
    assert opened(2) == [None, None]
    assert "NCCL adds up" in caplog.text


@pytest.mark.parametrize(("size", "is_local", "said"), [(9, True, "9 ranks"), (2, False, "2 ranks on several hosts")])
def test_groups_that_are_too_large_or_too_far_apart_do_without(
    size: int, is_local: bool, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert opened(size, is_local) == [None] * size
    assert f"({said})" in caplog.text


def test_nothing_is_said_where_nobody_asked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for asked, size in ((False, 2), (None, 4)):
        monkeypatch.setattr(peers, "ASKED_FOR", asked)
        assert opened(size) == [None] * size
        assert not made
        assert not caplog.records


def test_two_gpus_need_not_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ASKED_FOR", None)
    assert None not in opened(2)


def test_halves_of_a_step_are_summed_apart_where_nccl_sums_the_whole() -> None:
    group = object.__new__(Group)
    group._is_cuda, group._peers = True, None
    assert group.overlaps(MOST_ALONE + 1)
    assert not group.overlaps(MOST_ALONE)
    group._peers = object.__new__(PeerMemory)
    group._peers.copies = None
    assert group.overlaps(MOST_BYTES // 2 + 1)
    assert not group.overlaps(MOST_BYTES // 2)
    group._is_cuda, group._peers = False, None
    assert not group.overlaps(MOST_BYTES)


@pytest.mark.parametrize(
    ("num_bytes", "by"), [(MOST_BYTES // 2 + 16, "NCCL"), (MOST_BYTES // 2, "peers"), (LEAST_BYTES, "copies")]
)
def test_a_sum_that_is_begun_goes_where_its_half_was_meant_to_go(
    num_bytes: int, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, taken, begun = object.__new__(Group), [], object()
    group._is_cuda, group._peers, group._ranks = True, object.__new__(PeerMemory), SimpleNamespace()
    group._ranks.allreduce = lambda tensors: taken.append("NCCL")
    monkeypatch.setattr(PeerMemory, "start", lambda peers, x: begun if by == "copies" else None)
    monkeypatch.setattr(PeerMemory, "all_reduce", lambda peers, x: taken.append("peers") or True)
    started = group.start_all_reduce(torch.empty(num_bytes, dtype=torch.uint8, device="meta"))
    assert (started is begun) == (by == "copies")
    assert (started is None) == (by == "peers")
    assert taken == ([] if by == "copies" else [by])


def test_halves_of_a_step_are_summed_apart_where_copy_engines_carry_them() -> None:
    group = object.__new__(Group)
    group._is_cuda, group._peers = True, object.__new__(PeerMemory)
    group._peers.copies = object.__new__(Copies)
    assert group.overlaps(LEAST_BYTES)
    assert group.overlaps(PLACE_BYTES)
    assert not group.overlaps(PLACE_BYTES, captured=True)
    assert not group.overlaps(LEAST_BYTES - 1)
    assert group.overlaps(MOST_BYTES // 2 + 1)
