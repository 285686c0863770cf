"""Which of cuBLASLt's algorithms multiply: timed when an engine starts for the first time, for the sizes that its steps
have most, and kept for later starts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mii.engine.graphs import decode_bucket
from mii.engine.kept_choices import keep, kept_path, read_kept
from mii.engine.runner import Runner
from mii.modeling.decoder import Decoder
from mii.modeling.layers import TiedHead
from mii.modeling.mlp import DenseMLP
from mii.modeling.parameters import Linear, Module
from mii.ops import linear_hopper
from mii.ops.linear import pieces
from mii.ops.products import adopt, algorithm_of, choose, name_of

ASKED_FOR = os.environ.get("MII_CHOOSE_PRODUCTS", "") != "0"
SECONDS = 5.0
"""For all of them; what is left then is multiplied as cuBLASLt proposes, until a later start goes on."""
MOST_ROWS = 1024
"""Of steps that decode. Steps with more rows are those of prompts, most of which are as large as steps may be."""
_LEAST_WEIGHT = 1 << 20  # numbers; a smaller one's product is mostly its launch
_WARM_SECONDS, _LARGE_PATIENCE = 0.3, 8e-3  # of products that bring a card to its limit of power


@dataclass(slots=True)
class _Weights:
    """Weights of one shape. `most`: rows that are multiplied at a time; `kind`: the activation that follows."""

    all: list[torch.Tensor]
    most: int
    kind: str | None
    is_head: bool


@dataclass(frozen=True, slots=True)
class _Product:
    """So many rows by weights of one shape. `seconds`: for how long each algorithm is repeated."""

    weights: list[torch.Tensor]
    rows: int
    seconds: float

    @property
    def name(self) -> str:
        return name_of(self.weights[0], self.rows)


def choose_products(runner: Runner) -> str:
    """Chooses algorithms for a model's products; what came of it, in words."""
    if not ASKED_FOR:
        return "left to cuBLASLt: MII_CHOOSE_PRODUCTS=0"
    path = kept_path(runner.device)
    kept, unknown = read_kept(path), list[_Product]()
    products = list(_products(runner))
    for product in products:
        if product.name in kept:
            adopt(product.weights[0], product.rows, kept[product.name])
        else:
            unknown.append(product)
    if not unknown:
        return f"{len(products)} known from {path}"
    new, gain, ended = _time(unknown)
    if new and path is not None:
        keep(path, new)
    torch.cuda.empty_cache()
    better, known = sum(map(bool, new.values())), len(products) - len(unknown)
    found = f"{better} of {len(new)} by another algorithm than the first, up to {100 * gain:.0f} % faster"
    return f"{known} known; {found}{ended}"


@torch.inference_mode()
def _time(products: Sequence[_Product]) -> tuple[dict[str, bytes], float, str]:
    """The algorithms that were chosen, by the product's name, how much faster the best is, and what ended it early."""
    new, gain, end, is_warm = dict[str, bytes](), 0.0, time.monotonic() + SECONDS, False
    for product in products:
        if time.monotonic() > end:
            return new, gain, f"; {len(products) - len(new)} left for another start"
        try:
            if product.seconds == _LARGE_PATIENCE and not is_warm:
                _warm_up(product.weights[0], product.rows)
                is_warm = True
            times = choose(product.weights, product.rows, seconds=product.seconds)
        except torch.OutOfMemoryError:
            return new, gain, "; there is no memory to time more"
        if times is None:
            return new, gain, "; others are left to torch"
        new[product.name] = algorithm_of(product.weights[0], product.rows)
        gain = max(gain, times.first / times.chosen - 1)
    return new, gain, ""


def _products(runner: Runner) -> Iterator[_Product]:
    """Those of the largest steps first, which take most of the time that prompts take."""
    limits = runner.limits
    in_mlp = len(runner.arena.views(limits.max_tokens, limits.max_sequences).up)
    shapes = _shapes(runner.model, limits.max_tokens, in_mlp)
    if limits.max_tokens > MOST_ROWS:
        halves = runner.model.halves(limits.max_tokens, captured=limits.max_tokens <= runner.most_captured)
        whole = halves[0].stop if halves else limits.max_tokens
        for weights in shapes:
            if not weights.is_head:
                yield _Product(weights.all, next(pieces(whole, weights.most)).stop, _LARGE_PATIENCE)
    sequences = min(limits.max_sequences, MOST_ROWS)
    for rows in sorted({decode_bucket(count, limits.max_sequences) for count in range(1, sequences + 1)}):
        for weights in shapes:
            if not linear_hopper.serves(weights.all[0], rows, weights.kind):
                yield _Product(weights.all, rows, 1e-4)


def _shapes(model: Decoder, max_tokens: int, in_mlp: int) -> list[_Weights]:
    """The weights that are worth it, by shape, the largest first. `in_mlp`: rows that an MLP multiplies at a time."""
    shapes: dict[torch.Size, _Weights] = {}
    for parent, name, module in _multiplied(model):
        packed = module.packed
        if packed is None or packed.packed or module.bias is not None or packed.data.numel() < _LEAST_WEIGHT:
            continue
        kind, most = None, max_tokens
        if isinstance(parent, DenseMLP):
            kind, most = parent.kind if parent.gated and name == "up" else None, in_mlp
        found = shapes.setdefault(packed.data.shape, _Weights([], 0, kind, module is model.head))
        found.all.append(packed.data)
        found.most = max(found.most, most)
    return sorted(shapes.values(), key=lambda weights: -weights.all[0].numel())


def _multiplied(model: Decoder) -> Iterator[tuple[Module, str, Linear | TiedHead]]:
    """What multiplies, with its parent and its name there."""
    for _, parent in model.modules():
        for name, module in vars(parent).items():
            if isinstance(module, Linear | TiedHead):
                yield parent, name, module


def _warm_up(weight: torch.Tensor, rows: int) -> None:
    """Multiplies until a card that can be is at its limit of power, where the fastest algorithm may be another one."""
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    out = torch.empty(rows, weight.shape[0], dtype=weight.dtype, device=weight.device)
    end = time.monotonic() + _WARM_SECONDS
    while time.monotonic() < end:
        for _ in range(8):
            torch.mm(x, weight.t(), out=out)
        torch.cuda.synchronize(weight.device)
