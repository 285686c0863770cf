"""Products with the weights of an 8B Llama: our kernels beside cuBLASLt.

Each product alone, then chains over 32 layers with weights of their own, in one graph, so that nothing is found in the
cache and what lies between two kernels counts: the four products of a layer, and all of a layer but attention. At last
whole layers, of tokens that are generated, by the kernels that an engine chooses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.kernels_attention import Work, attention_batch, attention_plan
from benchmarks.timing import Call, Case, graph_seconds, run_cases
from mii.ops import linear_hopper
from mii.ops.attention import attention
from mii.ops.decode_attention import decode_attention
from mii.ops.linear import LinearWeight, gated_linear, linear, pack_linear
from mii.ops.norm import norm
from mii.ops.rope_kv import rope_kv
from mii.ops.summands import Summands

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4096, 14336, 32, 8, 128, 64
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
LAYER = {
    "qkv": (QKV, HIDDEN),
    "output": (HIDDEN, HIDDEN),
    "up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
WEIGHTS = LAYER | {"head": (128256, HIDDEN)}
ROWS, MORE_ROWS = (1, 4, 8, 16), (64, 128)  # that the stream takes, and more
CHAIN_ROWS, LAYERS = (1, 8, 16, 64, 128), 32
LAYER_ROWS, CONTEXT = (1, 8, 12, 16, 32, 64, 128, 256), 264  # of whole layers: sequences, and tokens of each
KERNELS = {
    "cuBLASLt": (),
    "streamed": ("STREAMED",),
    "wide": ("WIDE",),
    "both": ("STREAMED", "WIDE"),
}
FETCHED = (0, 8)  # MiB of the next weight that a streamed product brings into the cache
DTYPE, SIZE = torch.bfloat16, 2
LAYER_BYTES = SIZE * sum(n * k for n, k in LAYER.values())
CHOICES = ("STREAMED_ROWS", "FAST_STREAMED_ROWS", "WIDE_ROWS", "FAST_WIDE_ROWS", "PARTED_ROWS", "FETCH_BYTES")
OWN_CHOICES = {name: getattr(linear_hopper, name) for name in CHOICES}

Layers = list[list[LinearWeight]]


def run(device: torch.device) -> list[dict[str, Any]]:
    """A row for each weight, number of rows and kernel, then the chains, whose seconds are those of one layer."""
    if device.type != "cuda":
        return []
    products = run_cases(_products(), device)
    layers = [[_weight(device, n, k) for n, k in LAYER.values()] for _ in range(LAYERS)]
    chains = list(_chains(device, layers))
    for name, value in OWN_CHOICES.items():
        setattr(linear_hopper, name, value)
    return [*products, *chains, *_whole_layers(device, layers)]


def _choose(kernels: tuple[str, ...], fetched: int = linear_hopper.FETCH_BYTES >> 20) -> None:
    """Which of our kernels multiply, and how much they bring of what follows."""
    linear_hopper.STREAMED_ROWS = linear_hopper.FAST_STREAMED_ROWS = ROWS[-1] if "STREAMED" in kernels else 0
    linear_hopper.WIDE_ROWS = linear_hopper.FAST_WIDE_ROWS = range(1, 129 if "WIDE" in kernels else 1)
    linear_hopper.PARTED_ROWS = OWN_CHOICES["PARTED_ROWS"] if "WIDE" in kernels else range(0)
    linear_hopper.FETCH_BYTES = fetched << 20


def _products() -> Iterator[Case]:
    for name, (n, k) in WEIGHTS.items():
        for rows in ROWS:
            yield from (_case(name, rows, n, k, how) for how in ("cuBLASLt", "streamed", "wide"))
        for rows in MORE_ROWS:
            yield from (_case(name, rows, n, k, how) for how in ("cuBLASLt", "wide"))


def _case(name: str, rows: int, n: int, k: int, how: str) -> Case:
    def make(device: torch.device) -> Call:
        x = torch.randn(rows, k, device=device, dtype=DTYPE)
        weight, out = _weight(device, n, k), torch.empty(rows, n, device=device, dtype=DTYPE)

        def call() -> None:
            _choose(KERNELS[how])
            linear(out, x, weight)

        return call

    moved = SIZE * (n * k + rows * (n + k))
    return Case("linear", f"{name} {n} x {k}, {rows} rows, {how}", moved, make, 2 * rows * n * k)


def _weight(device: torch.device, n: int, k: int) -> LinearWeight:
    return pack_linear(torch.randn(n, k, device=device, dtype=DTYPE).mul_(k**-0.5))


class _Chain:
    """A layer's buffers and calls for a number of rows."""

    def __init__(self, device: torch.device, rows: int) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=DTYPE)

        self.hidden, self.residual, self.branch = (random(rows, HIDDEN) for _ in range(3))
        self.qkv, self.up, self.activated = (
            random(rows, QKV),
            random(rows, 2 * INTERMEDIATE),
            random(rows, INTERMEDIATE),
        )
        self.gain, self.table = random(HIDDEN), torch.randn(1024, HEAD_DIM, device=device)
        self.cache = random(2, -(-rows // BLOCK), KV_HEADS, BLOCK, HEAD_DIM)
        self.summands = torch.empty(linear_hopper.parts_size(device), device=device)
        self.left: torch.Tensor | Summands = self.branch
        self.rows = self.slots = torch.arange(rows, dtype=torch.int32, device=device)

    def products(self, weights: list[LinearWeight], following: LinearWeight) -> None:
        qkv, output, up, down = weights
        linear(self.qkv, self.hidden, qkv, following=output)
        linear(self.hidden, self.qkv[:, :HIDDEN], output, following=up)
        linear(self.up, self.hidden, up, following=down)
        linear(self.hidden, self.up[:, :INTERMEDIATE], down, following=following)

    def attend(self) -> torch.Tensor:
        """The heads' results; here the queries, once rotated, stand in for them."""
        heads = {"q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "rotary_dim": HEAD_DIM}
        rope_kv(self.qkv, self.cache[0], self.cache[1], self.table, self.rows, self.slots, **heads)
        return self.qkv[:, :HIDDEN]

    def layer(self, weights: list[LinearWeight], following: LinearWeight) -> None:
        qkv, output, up, down = weights
        norm(self.hidden, self.left, self.gain, eps=1e-5, residual=self.residual)
        linear(self.qkv, self.hidden, qkv, following=output)
        left = linear(self.branch, self.attend(), output, following=up, summands=self.summands)
        norm(self.hidden, left, self.gain, eps=1e-5, residual=self.residual)
        gated_linear(self.activated, self.up, self.hidden, up, "silu", following=down)
        self.left = linear(self.branch, self.activated, down, following=following, summands=self.summands)


class _WholeChain(_Chain):
    """With attention of each row to a context of its own, which `apart` a kernel for the rotation goes before."""

    def __init__(self, device: torch.device, rows: int, apart: bool) -> None:
        super().__init__(device, rows)
        self.apart = apart
        self.work = Work(((1, CONTEXT),) * rows, block=BLOCK)
        self.batch, blocks = attention_batch(self.work, device)
        self.plan = attention_plan(self.work, self.batch, device)
        self.cache = torch.randn(2, blocks, KV_HEADS, BLOCK, HEAD_DIM, device=device, dtype=DTYPE)
        self.slots = self.batch.block_table[:, (CONTEXT - 1) // BLOCK] * BLOCK + (CONTEXT - 1) % BLOCK
        self.attended = torch.empty(rows, HIDDEN, device=device, dtype=DTYPE)

    def attend(self) -> torch.Tensor:
        out, caches, scale = self.attended, (self.cache[0], self.cache[1]), HEAD_DIM**-0.5
        if self.apart:
            attention(out, super().attend(), *caches, self.batch, self.plan, scale=scale)
        else:
            tokens = (self.table, self.rows, self.slots)
            decode_attention(out, self.qkv, *caches, *tokens, self.batch, self.plan, scale=scale)
        return out


def _whole_layers(device: torch.device, layers: Layers) -> Iterator[dict[str, Any]]:
    for rows, apart in itertools.product(LAYER_ROWS, (True, False)):
        chain = _WholeChain(device, rows, apart)
        text = f"whole layer, {rows} x {CONTEXT} tokens{', rotation apart' if apart else ''}"
        yield _chained(text, layers, chain.layer, LAYER_BYTES + chain.work.bytes)


def _chains(device: torch.device, layers: Layers) -> Iterator[dict[str, Any]]:
    for rows in CHAIN_ROWS:
        chain = _Chain(device, rows)
        for name, run_layer in (("four products", chain.products), ("layer but attention", chain.layer)):
            for how, fetched in itertools.product(KERNELS, FETCHED):
                if not KERNELS[how] and fetched:
                    continue  # cuBLASLt brings nothing
                _choose(KERNELS[how], fetched)
                yield _chained(f"{name}, {rows} rows, {how}, {fetched} MiB ahead", layers, run_layer, LAYER_BYTES)


def _chained(
    text: str, layers: Layers, run_layer: Callable[[list[LinearWeight], LinearWeight], None], moved: int
) -> dict[str, Any]:
    """A layer's time where it follows itself with other weights."""
    calls = [partial(run_layer, layers[i], layers[(i + 1) % LAYERS][0]) for i in range(LAYERS)]
    return {"kernel": "linear chain", "case": text, "seconds": graph_seconds(calls), "bytes": moved}
