"""Which of cuBLASLt's algorithms multiply: timed when an engine starts for the first time, for the sizes that its steps
have most, and kept for later starts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
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
from mii.ops.linear import rows_at_once
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


def choose_products(runner: Runner) -> str:
    """Chooses algorithms for a model's products; what came of it, in words."""
    if not ASKED_FOR:
        return "left to cuBLASLt: MII_CHOOSE_PRODUCTS=0"
    path = kept_path(runner.device)
    kept, new = read_kept(path), dict[str, bytes]()
    begin, known, gain, is_warm = time.monotonic(), 0, 0.0, False
    with torch.inference_mode():
        for weights, rows, seconds in _products(runner):
            weight = weights.all[0]
            name = name_of(weight, rows)
            if name in kept:
                adopt(weight, rows, kept[name])
                known += 1
                continue
            if time.monotonic() - begin > SECONDS:
                break
            if seconds == _LARGE_PATIENCE and not is_warm:
                _warm_up(weight, rows)
                is_warm = True
            times = choose(weights.all, rows, seconds=seconds)
            if times is None:
                return "left to torch"
            new[name] = algorithm_of(weight, rows)
            gain = max(gain, times.first / times.chosen - 1)
    if not new:
        return f"{known} known from {path}"
    keep(path, new)
    torch.cuda.empty_cache()
    better = sum(map(bool, new.values()))
    return f"{known} known; {better} of {len(new)} by another algorithm than the first, up to {100 * gain:.0f} % faster"


def _products(runner: Runner) -> Iterator[tuple[_Weights, int, float]]:
    """The weights of a shape, rows, and for how long each algorithm is repeated; large steps, which gain most, lead."""
    limits, place = runner.limits, runner.model.place
    shapes = _shapes(runner.model, limits.max_tokens)
    large = [limits.max_tokens, limits.max_tokens // 2] if place.group is not None else [limits.max_tokens]
    if limits.max_tokens > MOST_ROWS:
        for weights in shapes:
            for rows in dict.fromkeys(min(rows, weights.most) for rows in large):
                if not weights.is_head:
                    yield weights, rows, _LARGE_PATIENCE
    sequences = min(limits.max_sequences, MOST_ROWS)
    for rows in sorted({decode_bucket(count, limits.max_sequences) for count in range(1, sequences + 1)}):
        for weights in shapes:
            if not linear_hopper.serves(weights.all[0], rows, weights.kind):
                yield weights, rows, 1e-4


def _shapes(model: Decoder, max_tokens: int) -> list[_Weights]:
    """The weights that are worth it, by shape, the largest first."""
    shapes: dict[torch.Size, _Weights] = {}
    pieces = rows_at_once(max_tokens, model.place.device)
    for parent, name, module in _multiplied(model):
        packed = module.packed
        if packed is None or packed.packed or module.bias is not None or packed.data.numel() < _LEAST_WEIGHT:
            continue
        kind, most = None, max_tokens
        if isinstance(parent, DenseMLP):
            kind, most = parent.kind if parent.gated and name == "up" else None, pieces
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
