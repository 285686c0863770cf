"""Products of a few rows with the weights of an 8B Llama: our streaming kernel beside cuBLASLt, in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import Case, run_cases  # type: ignore[import-not-found]

from mii.ops import linear as module
from mii.ops.linear import linear, pack_linear

WEIGHTS = {
    "qkv": (6144, 4096),
    "output": (4096, 4096),
    "up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ROWS = (1, 8, 16, 32, 64)


def run(device: torch.device) -> list[dict[str, Any]]:
    """A row for each weight, number of rows and kernel."""
    module.STREAMED_ROWS = max(ROWS)
    cases = []
    for name, (n, k) in WEIGHTS.items():
        for rows in ROWS:
            for streamed in (True, False):
                text = f"{name} {n} x {k}, {rows} rows, {'streamed' if streamed else 'cuBLASLt'}"
                make = _maker(rows, n, k, streamed)
                cases.append(Case("linear", text, 2 * (n * k + rows * (n + k)), make))
    return run_cases(cases, device)


def _maker(rows: int, n: int, k: int, streamed: bool) -> Callable[[torch.device], Callable[[], None]]:
    def make(device: torch.device) -> Callable[[], None]:
        x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
        weight = pack_linear(torch.randn(n, k, device=device, dtype=torch.bfloat16))
        out = torch.empty(rows, n, device=device, dtype=torch.bfloat16)
        if streamed:
            return lambda: linear(out, x, weight)
        return lambda: module._linear_torch(out, x, weight.data, None)

    return make
