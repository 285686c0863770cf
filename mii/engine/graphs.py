"""Steps as CUDA graphs: one launch in place of hundreds, for decode and mixed steps alike.

Every kernel of a step takes its work from lists in device memory, so a graph captured for a bucket of (tokens,
sequences) serves every step that fits in it. A bucket runs eagerly the first time (kernels load, cuBLAS picks its
algorithms), is captured the second time and replayed from then on. All graphs share one memory pool. Steps of more
than `MOST_TOKENS` tokens keep the device busy for longer than their launches take, so they are launched one kernel at
a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

MOST_TOKENS = 1024


def decode_bucket(sequences: int, limit: int) -> int:
    """Rows of the graph for a step in which every sequence feeds one token: 1, 2, 4, 8, then multiples that grow."""
    if sequences <= 8:
        return min(limit, 1 << (sequences - 1).bit_length())
    step = 8 if sequences <= 64 else 16 if sequences <= 256 else 32
    return min(limit, -(-sequences // step) * step)


def token_bucket(tokens: int, limit: int) -> int:
    """Rows of the graph for a mixed step: eighths of the power of two below, at least 16 apart."""
    step = max(16, 1 << max(0, tokens.bit_length() - 4))
    return min(limit, -(-tokens // step) * step)


def sample_bucket(sequences: int, limit: int) -> int:
    """Sequences of the graph for a mixed step; few sizes, since each multiplies the number of graphs."""
    return min(limit, next((size for size in (8, 32, 64, 128, 256, 384, 512, 768) if sequences <= size), limit))


class StepGraphs:
    """The captured graphs of one engine, by bucket.

    Args:
        device: The GPU.
        most: How many graphs are kept; further buckets run eagerly.
    """

    def __init__(self, device: torch.device, most: int = 512) -> None:
        self._most = most
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, bucket: tuple[int, int], body: Callable[[], None]) -> None:
        """Runs a step of this bucket on the current stream; `body` launches it on whatever stream is current."""
        if bucket not in self._graphs:
            if len(self._graphs) < self._most:
                self._graphs[bucket] = None
            body()
            return
        graph = self._graphs[bucket]
        if graph is None:
            graph = self._graphs[bucket] = self._capture(body)
        graph.replay()

    def _capture(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Not `torch.cuda.graph`: that collects garbage and empties caches each time, which takes longer than a
        capture.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                body()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return graph
