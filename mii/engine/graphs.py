"""Steps as CUDA graphs: one launch in place of hundreds, for decode and mixed steps alike.

Every kernel of a step takes its work from lists in device memory, so a graph captured for a bucket of (tokens,
sequences) serves every step that fits in it. All graphs share one memory pool.

They are captured when the engine starts (`mii.engine.capture`), those of decode first, as many as `CAPTURE_SECONDS`
allow; of a model that is divided among ranks where `MII_CAPTURE_RANKS=1` asks for it. A bucket that is left runs
eagerly the first time (kernels load, cuBLAS picks its algorithms), is captured the second time and replayed from then
on. Where an operation had no kernel for the model and torch served, nothing is captured.

Steps of many tokens keep the device busy for longer than their launches take, so they are launched one kernel at a time
and lose nothing: a layer's dozen launches take some 100 us of the host, hidden behind the step before, which takes
longer than that from some hundred tokens on. How many tokens that are is a matter of the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from mii.ops import native

CAPTURE_SECONDS = 3.0
MOST_TOKENS = 1024
_HIDES_LAUNCHES = 25e-3  # seconds of the device in which a host launches any step
_PRODUCTS = 600e12  # FLOP/s of the fastest card's matrix products: a slower card hides more


class Bucket(NamedTuple):
    """What a step's graph was made for.

    Attributes:
        tokens, sequences: So many at most.
        decodes: Whether every sequence feeds one token, and sees no key that another one gets in the same step.
        whole: Whether every row is wanted of the last layer, and not those alone that are sampled.
    """

    tokens: int
    sequences: int
    decodes: bool = False
    whole: bool = False

    @property
    def narrows(self) -> bool:
        """Whether few rows are sampled, so that the last layer is best computed of these."""
        return not (self.decodes or self.whole) and 2 * self.sequences <= self.tokens


def most_captured_tokens(weights: int, max_tokens: int) -> int:
    """The largest step worth a graph: of a model of so many weights. Above, its products alone hide its launches.

    >>> most_captured_tokens(8_030_000_000, 8192), most_captured_tokens(135_000_000, 8192)
    (1024, 8192)
    """
    return min(max_tokens, max(MOST_TOKENS, int(_HIDES_LAUNCHES * _PRODUCTS / (2 * weights))))


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
    """Sequences of the graph for a mixed step; few sizes, since each multiplies the number of graphs.

    The head's product over 64 rows takes as long as over one: both read its weights once.
    """
    return min(limit, next((size for size in (64, 128, 256, 512) if sequences <= size), limit))


def graph_bucket(step: Bucket, max_sequences: int, max_tokens: int) -> Bucket:
    """That of the graph which serves a step of this size.

    >>> graph_bucket(Bucket(3, 3, decodes=True), 512, 8192), graph_bucket(Bucket(40, 3), 512, 8192)
    (Bucket(tokens=4, sequences=4, decodes=True), Bucket(tokens=48, sequences=64, decodes=False))
    """
    if step.decodes:
        size = decode_bucket(step.tokens, max_sequences)
        return Bucket(size, size, decodes=True)
    tokens, sequences = token_bucket(step.tokens, max_tokens), sample_bucket(step.sequences, max_sequences)
    return Bucket(tokens, sequences, whole=step.whole)


def all_buckets(max_sequences: int, max_tokens: int) -> list[Bucket]:
    """That of every graph for steps of up to `max_tokens` tokens: decode first, small ones first."""
    decode = {decode_bucket(count, max_sequences) for count in range(1, max_sequences + 1)}
    buckets = [Bucket(size, size, decodes=True) for size in sorted(decode)]
    for tokens in sorted({token_bucket(count, max_tokens) for count in range(1, max_tokens + 1)}):
        most = sample_bucket(min(tokens, max_sequences), max_sequences)
        sizes = {sample_bucket(count, max_sequences) for count in (1, 65, 129, 257, 513) if count <= most}
        buckets += [Bucket(tokens, size) for size in sorted(sizes)]
    return buckets


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
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._fallbacks = native.fallbacks

    def capture(self, bucket: Hashable, body: Callable[[], None]) -> None:
        """Captures a bucket that has run before, unless it is there or torch has had to serve since the start."""
        if native.fallbacks != self._fallbacks:
            return
        if self._graphs.get(bucket) is None and len(self._graphs) < self._most:
            self._graphs[bucket] = self._capture(body)

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, bucket: Hashable, body: Callable[[], None]) -> None:
        """Runs a step of this bucket on the current stream; `body` launches it on whatever stream is current."""
        if bucket not in self._graphs:
            before = native.fallbacks
            body()
            if len(self._graphs) < self._most and native.fallbacks == before:
                self._graphs[bucket] = None
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
