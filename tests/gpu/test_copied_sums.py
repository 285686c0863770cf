"""Sums of two GPUs that copy engines carry: bit for bit what adding gives, however late a rank comes.

With one GPU the ranks of the first tests are streams of one process; the others need two.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b

import pytest
import torch

from mii.errors import GenerationError
from mii.ops import abi, native
from mii.ops.norm import norm_arguments
from mii.parallel.copies import MOST_UNDER_WAY, PLACE_BYTES, PLACES, Copies
from mii.parallel.peers import PeerMemory
from tests.gpu.test_all_reduce import KINDS, NormCase, expected, part
from tests.ops.kernel_checks import DTYPES
from tests.parallel.crew import Crew, with_gpus

AT_ONCE = 1 << 20
SHAPES = ((1, 64), (3, 1000), (33, 2048), (200, 4096), (7, 8192), (5, 16384))


class Streams:
    """Two ranks on one GPU, each a stream."""

    def __init__(self, patience: float = 10.0) -> None:
        library, device = native.library(torch.device("cuda")), torch.device("cuda", torch.cuda.current_device())
        assert library is not None
        size = AT_ONCE + PLACES * PLACE_BYTES
        self.memory = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self.lost = [torch.zeros(1, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self.addresses = (ctypes.c_void_p * 2)(*(memory.data_ptr() for memory in self.memory))
        self.streams = [torch.cuda.Stream() for _ in range(2)]
        places = ctypes.addressof(self.addresses)
        self.copies = [
            Copies(
                abi.MiiRanks(places, self.lost[rank].data_ptr(), None, AT_ONCE, int(patience * 1e9), rank, 2, 0),
                library,
                device,
            )
            for rank in range(2)
        ]
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
def test_streams_add_up(dtype: torch.dtype) -> None:
    ranks = Streams()
    for seed, packs in enumerate((1, 2, 127, 255, 256, 257, 40_000)):
        count = packs * 16 // dtype.itemsize
        parts = [part(rank, count, dtype, seed) for rank in range(2)]
        right = expected(2, count, dtype, seed)
        torch.cuda.synchronize()
        for rank in seed % 2, 1 - seed % 2:
            with torch.cuda.stream(ranks.streams[rank]):
                started = ranks.copies[rank].start(parts[rank])
                assert started is not None
                started.wait()
        torch.cuda.synchronize()
        assert all(torch.equal(each, right) for each in parts), f"{packs} packs"
    assert not any(lost.item() for lost in ranks.lost)


def test_what_is_not_for_copies_is_refused() -> None:
    copies = Streams().copies[0]
    x = torch.zeros(16, device="cuda")
    assert copies.start(torch.zeros(PLACE_BYTES // 4 + 4, device="cuda")) is None
    assert copies.start(x[:3]) is None
    assert copies.start(x.double()) is None
    under_way = [copies.start(x) for _ in range(MOST_UNDER_WAY + 1)]
    assert [each is None for each in under_way] == [False] * MOST_UNDER_WAY + [True]
    with torch.cuda.stream(torch.cuda.Stream()):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            assert copies.start(x) is None
            x.add_(1)
    torch.cuda.synchronize()


def test_a_copy_that_does_not_come_is_given_up_once() -> None:
    ranks = Streams(patience=0.5)
    x = torch.ones(64, device="cuda")
    begin = time.monotonic()
    for _ in range(20):
        started = ranks.copies[0].start(x)
        assert started is not None
        started.wait()
    torch.cuda.synchronize()
    assert 0.4 < time.monotonic() - begin < 5
    assert ranks.lost[0].item() == 2


# ---- ranks as processes with a GPU each ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    crew = Crew(2, with_gpus)
    yield crew
    crew.close()


def norms(peers: PeerMemory, dtype: torch.dtype, kind: int) -> list[str]:
    """Digests of what came out."""
    outs = []
    for seed, (rows, width) in enumerate(SHAPES):
        call = NormCase(peers.rank, 2, rows, width, dtype, kind, seed)
        started = peers.start(call.x)
        assert started is not None
        if started.norm(call.arguments()):
            call.check()
            outs.append(blake2b(call.out.cpu().view(torch.uint8).numpy().tobytes()).hexdigest())
        else:
            assert torch.equal(call.x, call.sum)
    return outs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_sums_are_those_of_two_kernels(crew: Crew, dtype: torch.dtype, kind: int) -> None:
    first, second = crew.run(norms, dtype, kind)
    assert len(first) == (0 if dtype == torch.float32 else len(SHAPES))
    assert first == second


def interleaved(peers: PeerMemory, count: int) -> int:
    """Sums of any size, two under way at a time, among sums of the other kind; some late on one rank, and the numbers
    that were sent are overwritten at once. How many numbers came out wrong, found on the device.
    """
    chance = random.Random(7)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    under_way: list[Callable[[], None]] = []
    buffers = [torch.empty(PLACE_BYTES // 2, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    small = torch.empty(512, dtype=torch.bfloat16, device="cuda")

    def begin(turn: int, elements: int, residual: torch.Tensor | None) -> None:
        x = buffers[turn % 2][:elements]
        x.fill_(turn % 61 + peers.rank)
        started = peers.start(x)
        assert started is not None
        total = 2 * (turn % 61) + 1

        def finish() -> None:
            found = x
            if residual is None:
                started.wait()
            else:
                rows = x.view(residual.shape)
                arguments = norm_arguments(torch.empty_like(rows), rows, None, eps=1e-5, residual=residual)
                assert arguments is not None
                assert started.norm(arguments)
                found = residual
            wrong.add_((found != total).sum())
            x.fill_(-1)

        under_way.append(finish)

    for turn in range(count):
        if chance.randrange(8) == peers.rank:
            torch.cuda._sleep(chance.randrange(1_000_000))
        else:
            chance.randrange(1_000_000)
        rows = 1 << chance.randrange(12)
        residual = torch.zeros(rows, 4096, dtype=torch.bfloat16, device="cuda") if chance.randrange(2) else None
        if len(under_way) == MOST_UNDER_WAY:
            under_way.pop(0)()
        begin(turn, rows * 4096, residual)
        if chance.randrange(3) == 0:
            small.fill_(turn % 61)
            assert peers.all_reduce(small)
            wrong.add_((small != 2 * (turn % 61)).sum())
    for finish in under_way:
        finish()
    torch.cuda.synchronize()
    return int(wrong.item()) + peers.lost()


def test_two_sums_under_way_at_a_time_a_thousand_times(crew: Crew) -> None:
    assert crew.run(interleaved, 1000) == [0, 0]


def alone(peers: PeerMemory) -> tuple[str, float]:
    """A sum that the other rank does not come to: what is said, and after how long."""
    x, done, said, begin = torch.ones(4096, device="cuda"), torch.cuda.Event(), "", time.monotonic()
    try:
        started = peers.start(x)
        assert started is not None
        started.wait()
        done.record()
        peers.wait(done)
    except GenerationError as error:
        said = str(error)
    return said, time.monotonic() - begin


def test_a_rank_that_hangs_ends_the_wait() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    crew = Crew(2, with_gpus, patience=2.0)
    ((said, seconds),) = crew.run(alone, ranks=[0], seconds=30)
    crew.close()
    assert said.startswith("rank 1 of 2 has sent nothing to rank 0's GPU for 2 seconds")
    assert 1.5 < seconds < 6
