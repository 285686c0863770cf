"""Mixture of experts at the sizes of Mixtral 8x7B and Qwen3-30B-A3B: routing, the products by each kernel, a layer.

Bytes count the weights of the experts that are hit, once; the routing is random, the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.timing import Call, Case, run_cases
from mii.ops import abi
from mii.ops.moe import moe_combine, moe_down, moe_mlp, moe_up, stream_rows
from mii.ops.moe_routing import ExpertLists, ExpertRows, Routing, route
from mii.ops.moe_weights import pack_experts

KERNELS = {
    abi.MOE_STREAM: "stream",
    abi.MOE_MMA: "mma",
    abi.MOE_WGMMA: "wgmma",
    abi.MOE_SIMPLE: "simple",
}


@dataclass(frozen=True)
class Shape:
    """One layer's sizes."""

    name: str
    hidden: int
    width: int
    routing: Routing

    def logits(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, self.routing.experts, generator=torch.Generator().manual_seed(tokens)).bfloat16()

    def hit(self, tokens: int) -> int:
        """Experts that some token chooses."""
        return len(self.logits(tokens).topk(self.routing.top_k).indices.unique())

    def weight_bytes(self, tokens: int, matrices: int) -> int:
        return 2 * matrices * self.hit(tokens) * self.hidden * self.width


QWEN3 = Shape("qwen3-30b-a3b", 2048, 768, Routing(128, 8))
MIXTRAL = Shape("mixtral-8x7b", 4096, 14336, Routing(8, 2))


def run(device: torch.device) -> list[dict[str, Any]]:
    """A row for each operation, shape, number of tokens and kernel; nothing on a CPU."""
    return run_cases(_cases(torch.cuda.get_device_capability() == (9, 0)), device) if device.type == "cuda" else []


def _cases(hopper: bool) -> Iterator[Case]:
    for tokens in (1, 16, 512, 8192):
        yield _routing(QWEN3, tokens)
    for shape, counts in ((QWEN3, (1, 4, 16, 64, 256, 512)), (MIXTRAL, (1, 4, 16, 64))):
        for tokens in counts:
            yield _both(shape, tokens, stream_rows(shape.routing, tokens))
    for kernel, rows in ((abi.MOE_MMA, 128), (abi.MOE_WGMMA, 192)) if hopper else ((abi.MOE_MMA, 128),):
        for shape in (QWEN3, MIXTRAL):
            yield from _products(shape, 8192, kernel, rows)
    yield from _products(QWEN3, 2048, *_for_prompts(hopper))
    yield from _products(QWEN3, 1, abi.MOE_SIMPLE, 8)
    for shape in (QWEN3, MIXTRAL):
        for tokens in (1, 4, 16, 64):
            yield _layer(shape, tokens, abi.MOE_STREAM, stream_rows(shape.routing, tokens))
    for shape in (QWEN3, MIXTRAL):
        yield _layer(shape, 8192, *_for_prompts(hopper))


def _for_prompts(hopper: bool) -> tuple[int, int]:
    """The best kernel for many rows, and the rows of its tiles."""
    return (abi.MOE_WGMMA, 192) if hopper else (abi.MOE_MMA, 128)


@dataclass
class Layer:
    """The tensors of one layer and one step."""

    shape: Shape
    tokens: int
    kernel: int
    tile_rows: int
    device: torch.device
    parts: tuple[str, ...]

    def __post_init__(self) -> None:
        shape, pairs = self.shape, self.tokens * self.shape.routing.top_k

        def random(*sizes: int) -> torch.Tensor:
            return torch.empty(sizes, device=self.device, dtype=torch.bfloat16).normal_(std=0.02)

        experts = shape.routing.experts
        if "up" in self.parts:
            self.up = pack_experts(random(experts, 2 * shape.width, shape.hidden), gated=True)
        if "down" in self.parts:
            self.down = pack_experts(random(experts, shape.hidden, shape.width), gated=False)
        self.x, self.hidden = random(self.tokens, shape.hidden), random(pairs, shape.width)
        self.sums, self.out = random(pairs, shape.hidden), random(self.tokens, shape.hidden)
        self.logits = shape.logits(self.tokens).to(self.device)
        lists = ExpertLists(shape.routing, self.tokens, self.device)
        self.rows: ExpertRows = lists.rows(self.tokens, self.kernel, self.tile_rows)
        self.route()

    def route(self) -> None:
        route(self.rows, self.logits, self.shape.routing)

    def multiply_up(self) -> None:
        moe_up(self.hidden, self.x, self.up, self.rows, self.shape.routing, "silu", scratch=self.sums)

    def multiply_down(self) -> None:
        moe_down(self.sums, self.hidden, self.down, self.rows, self.shape.routing)

    def multiply(self) -> None:
        moe_mlp(self.sums, self.hidden, self.x, self.up, self.down, self.rows, self.shape.routing, "silu")

    def all(self) -> None:
        self.route()
        self.multiply()
        moe_combine(self.out, self.sums, top_k=self.shape.routing.top_k)


def _routing(shape: Shape, tokens: int) -> Case:
    pairs = tokens * shape.routing.top_k
    moved = 2 * tokens * shape.routing.experts + 12 * pairs
    return Case(
        "moe route", f"{shape.name}, {tokens} tokens", moved, _maker(shape, tokens, abi.MOE_STREAM, 64, (), Layer.route)
    )


def _products(shape: Shape, tokens: int, kernel: int, tile_rows: int) -> Iterator[Case]:
    pairs, text = tokens * shape.routing.top_k, f"{shape.name}, {tokens} tokens, {KERNELS[kernel]} {tile_rows}"
    for part, matrices, moved, call in (
        ("up", 2, 2 * (tokens * shape.hidden + pairs * shape.width), Layer.multiply_up),
        ("down", 1, 2 * pairs * (shape.hidden + shape.width), Layer.multiply_down),
    ):
        flops = 2 * pairs * matrices * shape.hidden * shape.width
        total = shape.weight_bytes(tokens, matrices) + moved
        yield Case(f"moe {part}", text, total, _maker(shape, tokens, kernel, tile_rows, (part,), call), flops)


def _both(shape: Shape, tokens: int, tile_rows: int) -> Case:
    pairs = tokens * shape.routing.top_k
    moved = shape.weight_bytes(tokens, 3) + 2 * (tokens * shape.hidden + pairs * (2 * shape.width + shape.hidden))
    make = _maker(shape, tokens, abi.MOE_STREAM, tile_rows, ("up", "down"), Layer.multiply)
    flops = 6 * pairs * shape.hidden * shape.width
    return Case("moe products", f"{shape.name}, {tokens} tokens, stream {tile_rows}", moved, make, flops)


def _layer(shape: Shape, tokens: int, kernel: int, tile_rows: int) -> Case:
    flops = 6 * tokens * shape.routing.top_k * shape.hidden * shape.width
    text = f"{shape.name}, {tokens} tokens, {KERNELS[kernel]}"
    moved = shape.weight_bytes(tokens, 3) + 4 * tokens * shape.hidden
    return Case("moe layer", text, moved, _maker(shape, tokens, kernel, tile_rows, ("up", "down"), Layer.all), flops)


def _maker(
    shape: Shape,
    tokens: int,
    kernel: int,
    tile_rows: int,
    parts: tuple[str, ...],
    call: Callable[[Layer], None],
) -> Callable[[torch.device], Call]:
    return lambda device: partial(call, Layer(shape, tokens, kernel, tile_rows, device, parts))
