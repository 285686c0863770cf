"""Sums over GPUs in each other's memory: bit for bit what adding in the order of the ranks gives, on every rank.

With one GPU the ranks of the first tests are streams of one process; the others need a GPU for each rank.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import pytest
import torch

from mii.errors import GenerationError
from mii.ops import abi, native
from mii.ops.norm import norm, norm_arguments
from mii.parallel.peers import MOST_BYTES, PeerMemory
from tests.ops.kernel_checks import DTYPES, assert_close
from tests.parallel.crew import Crew, with_gpus

PACKS = (1, 2, 3, 5, 127, 128, 129, 1000, 4096, 32768, 32769)  # of 16 bytes
SHAPES = ((1, 64), (1, 4096), (1, 8192), (3, 1000), (5, 4104), (16, 8192), (33, 2048), (200, 512), (7, 16384))
KINDS = (abi.RMS, abi.RMS_PLUS1, abi.LAYER)


def part(rank: int, count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """What a rank has; every rank can make every other one's."""
    generator = torch.Generator("cuda").manual_seed(1000 * seed + rank)
    return torch.randn(count, generator=generator, device="cuda").to(dtype)


def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for each in parts[1:]:
        total = total + each.float()
    return total.to(parts[0].dtype)


def expected(size: int, count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return in_order([part(rank, count, dtype, seed) for rank in range(size)])


# ---- ranks as streams of one GPU -----------------------------------------------------------------------------------
class Streams:
    """Ranks on one GPU, which have few CTAs each so that all fit on it at once."""

    def __init__(self, size: int, half: int = 1 << 20, patience: float = 10.0) -> None:
        library = native.library(torch.device("cuda"))
        assert library is not None
        self.size, self.library = size, library
        self.memory = [torch.zeros(256 + 2 * half, dtype=torch.uint8, device="cuda") for _ in range(size)]
        self.lost = [torch.zeros(1, dtype=torch.int32, pin_memory=True) for _ in range(size)]
        self.addresses = (ctypes.c_void_p * size)(*(memory.data_ptr() for memory in self.memory))
        self.streams = [torch.cuda.Stream() for _ in range(size)]
        self.patience = int(patience * 1e9)
        torch.cuda.synchronize()

    def ranks(self, rank: int) -> ctypes.Structure:
        place, lost = ctypes.addressof(self.addresses), self.lost[rank].data_ptr()
        return abi.MiiRanks(place, lost, None, self.memory[0].numel(), self.patience, rank, self.size, 8)

    def all_reduce(self, rank: int, x: torch.Tensor, shots: int) -> None:
        args = abi.MiiAllReduce(self.ranks(rank), x.data_ptr(), x.numel(), shots, abi.DTYPE_CODES[x.dtype])
        assert self.library.call("mii_all_reduce", args, self.streams[rank].cuda_stream)

    def all_reduce_norm(self, rank: int, arguments: ctypes.Structure, shots: int) -> None:
        args = abi.MiiAllReduceNorm(self.ranks(rank), arguments, shots)
        assert self.library.call("mii_all_reduce_norm", args, self.streams[rank].cuda_stream)

    def all_gather(self, rank: int, out: torch.Tensor, x: torch.Tensor) -> None:
        args = abi.MiiAllGather(self.ranks(rank), out.data_ptr(), x.data_ptr(), x.numel() * x.element_size() // 4)
        assert self.library.call("mii_all_gather", args, self.streams[rank].cuda_stream)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_streams_add_up_in_the_order_of_the_ranks(dtype: torch.dtype, size: int) -> None:
    ranks = Streams(size)
    for seed, packs in enumerate((1, 2, 5, 127, 129, 1000, 4097)):
        count = packs * 16 // dtype.itemsize
        for shots in (1, 2):
            parts = [part(rank, count, dtype, seed) for rank in range(size)]
            right = in_order(parts)
            torch.cuda.synchronize()
            for rank in range(size):
                ranks.all_reduce(rank, parts[rank], shots)
            torch.cuda.synchronize()
            assert all(torch.equal(each, right) for each in parts), f"{packs} packs, {shots} shots"
    assert not any(lost.item() for lost in ranks.lost)


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streams_norm_what_they_add_up(dtype: torch.dtype, kind: int, shots: int) -> None:
    ranks = Streams(4, half=8 << 20)
    for seed, (rows, width) in enumerate(SHAPES):
        calls = [NormCase(rank, 4, rows, width, dtype, kind, seed) for rank in range(4)]
        torch.cuda.synchronize()
        for rank, call in enumerate(calls):
            ranks.all_reduce_norm(rank, call.arguments(), shots)
        torch.cuda.synchronize()
        for call in calls:
            call.check()
            assert torch.equal(call.out, calls[0].out)


def test_streams_gather() -> None:
    ranks = Streams(3)
    for seed, count in enumerate((1, 3, 129, 5000)):
        parts = [part(rank, count, torch.float32, seed) for rank in range(3)]
        outs = [torch.zeros(3, count, device="cuda") for _ in range(3)]
        torch.cuda.synchronize()
        for rank in range(3):
            ranks.all_gather(rank, outs[rank], parts[rank])
        torch.cuda.synchronize()
        assert all(torch.equal(out, torch.stack(parts)) for out in outs)


def test_a_stream_that_does_not_come_is_given_up_once() -> None:
    ranks = Streams(2, patience=0.5)
    x = torch.ones(64, device="cuda")
    torch.cuda.synchronize()
    begin = time.monotonic()
    for _ in range(20):
        ranks.all_reduce(0, x, 1)
    torch.cuda.synchronize()
    assert 0.4 < time.monotonic() - begin < 5
    assert ranks.lost[0].item() == 2


class NormCase:
    """A sum with a norm behind it, and what must come of it: the residual to the bit, the norm as close as ours is."""

    def __init__(self, rank: int, size: int, rows: int, width: int, dtype: torch.dtype, kind: int, seed: int) -> None:
        self.x = part(rank, rows * width, dtype, seed).view(rows, width)
        self.residual = part(90, rows * width, dtype, seed).view(rows, width)
        self.weight, self.kind = part(91, width, dtype, seed), kind
        self.bias = part(92, width, dtype, seed) if kind == abi.LAYER else None
        self.out = torch.full_like(self.x, torch.nan)
        self.sum = expected(size, rows * width, dtype, seed).view(rows, width)
        self.before = self.residual.clone()

    def options(self, residual: torch.Tensor) -> dict[str, Any]:
        return {"eps": 1e-5, "bias": self.bias, "residual": residual, "kind": self.kind}

    def arguments(self) -> ctypes.Structure:
        arguments = norm_arguments(self.out, self.x, self.weight, **self.options(self.residual))
        assert arguments is not None
        return arguments

    def check(self) -> None:
        right = torch.empty_like(self.out)
        norm(right, self.sum, self.weight, **self.options(self.before))
        assert torch.equal(self.residual, self.before)
        assert_close(self.out, right, ulps=3 if self.out.dtype != torch.float32 else 10)


# ---- ranks as processes with a GPU each ----------------------------------------------------------------------------
@pytest.fixture(scope="module", params=[2, 4])
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs, there are {torch.cuda.device_count()}")
    crew = Crew(request.param, with_gpus)
    yield crew
    crew.close()


def sums(peers: PeerMemory, dtype: torch.dtype) -> None:
    sizes = [packs * 16 for packs in PACKS] + [MOST_BYTES]
    for seed, num_bytes in enumerate(sizes):
        count = num_bytes // dtype.itemsize
        right = expected(peers.size, count, dtype, seed)
        for shots in (1, 2, None):
            x = part(peers.rank, count, dtype, seed)
            if peers.all_reduce(x, shots):
                assert torch.equal(x, right), f"{num_bytes} bytes, {shots} shots, lost {peers.lost()}"
            else:  # all to all of the largest, among many, has no room
                assert shots == 1
                assert num_bytes == MOST_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_in_the_order_of_the_ranks(crew: Crew, dtype: torch.dtype) -> None:
    crew.run(sums, dtype)


def norms(peers: PeerMemory, dtype: torch.dtype, kind: int) -> list[str]:
    """Digests of what came out."""
    outs = []
    for seed, (rows, width) in enumerate(SHAPES):
        for shots in (1, 2):
            call = NormCase(peers.rank, peers.size, rows, width, dtype, kind, seed)
            if peers.all_reduce_norm(call.arguments(), shots):
                call.check()
                outs.append(blake2b(call.out.cpu().view(torch.uint8).numpy().tobytes()).hexdigest())
    return outs


def fits(size: int, width: int, dtype: torch.dtype, shots: int) -> bool:
    """Whether there is a kernel, and its CTA can hold a row: a thread four packs of it, or of two shots one of each
    rank's part.
    """
    if dtype == torch.float32:
        return False
    threads = 384 if shots == 2 and size > 4 else 512
    packs = width // 8
    return -(-packs // (size if shots == 2 else 4)) <= threads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_sums_are_those_of_two_kernels(crew: Crew, dtype: torch.dtype, kind: int) -> None:
    first, *others = crew.run(norms, dtype, kind)
    assert len(first) == sum(fits(1 + len(others), width, dtype, shots) for _, width in SHAPES for shots in (1, 2))
    assert all(other == first for other in others)


def mixed(peers: PeerMemory, count: int) -> None:
    """Sums, norms and gathers of any size after one another, some late on one rank."""
    chance = random.Random(5)
    for seed in range(count):
        kind, late = chance.choice(("one", "two", "norm", "gather")), chance.randrange(4 * peers.size)
        packs, shots = int(2 ** chance.uniform(0, 14)), chance.choice((1, 2))
        if late == peers.rank:
            torch.cuda._sleep(2_000_000)
        if kind == "norm":
            call = NormCase(peers.rank, peers.size, 1 + packs % 70, 1024, torch.bfloat16, abi.RMS, seed)
            assert peers.all_reduce_norm(call.arguments(), shots)
            call.check()
        elif kind == "gather":
            x = part(peers.rank, 1 + packs % 999, torch.float32, seed)
            out = torch.zeros(peers.size, x.numel(), device="cuda")
            assert peers.all_gather(out, x)
            right = [part(rank, x.numel(), torch.float32, seed) for rank in range(peers.size)]
            assert torch.equal(out, torch.stack(right)), f"gather {seed}"
        else:
            x = part(peers.rank, packs * 8, torch.bfloat16, seed)
            assert peers.all_reduce(x, 1 if kind == "one" else 2)
            assert torch.equal(x, expected(peers.size, packs * 8, torch.bfloat16, seed)), f"{kind} {seed}"


def test_whatever_follows_whatever(crew: Crew) -> None:
    crew.run(mixed, 300)


def replayed(peers: PeerMemory, times: int) -> int:
    """Replays a graph of sums of all kinds; every replay has other numbers. How many came out wrong, on the device."""
    size, me = peers.size, peers.rank
    small, large = (torch.zeros(packs * 8, dtype=torch.bfloat16, device="cuda") for packs in (64, 20000))
    x, residual, out = (torch.zeros(4, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    gathered, mine = torch.zeros(size, 64, device="cuda"), torch.zeros(64, device="cuda")
    turn, wrong = torch.zeros((), device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    order = torch.arange(size, device="cuda").float().unsqueeze(1)

    def body() -> None:
        turn.add_(1)
        number = turn % 16
        whole = number * size + size * (size - 1) // 2
        for tensor in (small, large, x, mine):
            tensor.copy_((number + me).expand_as(tensor))
        residual.zero_()
        torch.cuda._sleep(3000 * me)
        peers.all_reduce(small, 1)
        peers.all_reduce(large, 2)
        peers.all_reduce_norm(norm_arguments(out, x, None, eps=1e-5, residual=residual), 1)  # type: ignore[arg-type]
        wrong.add_((residual != whole).sum())
        x.copy_((number + me).expand_as(x))
        residual.zero_()
        peers.all_reduce_norm(norm_arguments(out, x, None, eps=1e-5, residual=residual), 2)  # type: ignore[arg-type]
        peers.all_gather(gathered, mine)
        wrong.add_((small != whole).sum() + (large != whole).sum() + (residual != whole).sum())
        wrong.add_((gathered != number + order).sum())

    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        body()
    for _ in range(times):
        graph.replay()
    torch.cuda.synchronize()
    assert turn.item() == times + 1
    return int(wrong.item()) + peers.lost()


def test_a_graph_is_replayed_a_thousand_times(crew: Crew) -> None:
    assert crew.run(replayed, 1000) == [0] * len(crew.processes)


def alone(peers: PeerMemory) -> tuple[str, float, float]:
    """A sum that the other rank does not come to: what is said, after how long, and how long twenty more take."""
    x, done = torch.ones(4096, device="cuda"), torch.cuda.Event()
    torch.cuda.synchronize()
    said, begin = "", time.monotonic()
    try:
        peers.all_reduce(x)
        done.record()
        peers.wait(done)
    except (GenerationError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    first = time.monotonic() - begin
    try:
        for _ in range(20):
            peers.all_reduce(x)
        torch.cuda.synchronize()
    except RuntimeError:  # the memory of a process that has died is gone
        pass
    return said, first, time.monotonic() - begin - first


@pytest.mark.parametrize("killed", [False, True])
def test_a_rank_that_hangs_or_has_died_ends_the_wait(killed: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    crew = Crew(2, with_gpus, patience=2.0)
    crew.run(sums, torch.float32)
    if killed:
        crew.signal(1, signal.SIGKILL)
    ((said, first, more),) = crew.run(alone, ranks=[0], seconds=30)
    crew.signal(0, signal.SIGKILL)
    crew.close()
    assert said, "nothing was noticed"
    assert killed or said.startswith("GenerationError: rank 1 of 2 has sent nothing to rank 0's GPU for 2 seconds")
    assert first < 6
    assert more < 2


def shared(peers: PeerMemory) -> None:
    x = part(peers.rank, 4096, torch.bfloat16, 1)
    assert peers.all_reduce(x)
    assert torch.equal(x, expected(peers.size, 4096, torch.bfloat16, 1))


@pytest.mark.skipif(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") is not None, reason="processes take turns without MPS")
def test_two_processes_on_one_gpu_find_each_others_memory() -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("ranks have a GPU each here")
    crew = Crew(2, with_gpus)
    crew.run(shared)
    crew.close()
