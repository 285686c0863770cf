"""Prompts by Hopper's warpgroup products, which MII_WGMMA=1 asks for; kernels_attention.py has the same without.

Nothing on other cards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.kernels_attention import Work, prompt
from benchmarks.timing import Case, run_cases


def run(device: torch.device) -> list[dict[str, Any]]:
    if device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return []
    before = os.environ.get("MII_WGMMA")
    os.environ["MII_WGMMA"] = "1"  # the library asks for it at every launch
    try:
        return run_cases(_cases(), device)
    finally:
        del os.environ["MII_WGMMA"]
        if before is not None:
            os.environ["MII_WGMMA"] = before


def _cases() -> Iterator[Case]:
    for seqs, length in ((8, 2048), (2, 8192), (1, 32768), (32, 512), (1, 2048)):
        yield prompt(f"{seqs} of {length}, wgmma", Work(((length, length),) * seqs))
    yield prompt("8 of 2048, heads 32/32, wgmma", Work(((2048, 2048),) * 8, kv_heads=32))
    yield prompt("8 of 2048, heads of 64, wgmma", Work(((2048, 2048),) * 8, head_dim=64))
    yield prompt("8 of 2048, softcap, wgmma", Work(((2048, 2048),) * 8, softcap=50.0))
    yield prompt("2 of 8192, window 1024, wgmma", Work(((8192, 8192),) * 2, window=1024))
    yield prompt("chunk of 512 at 8192, wgmma", Work(((512, 8192),)))
    yield prompt("chunk of 512, 256 x 1 at 1024, wgmma", Work(((512, 2048), *(((1, 1024),) * 256))))
