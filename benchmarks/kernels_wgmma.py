"""Prompts by Hopper's warpgroup products; kernels_attention.py has the same without. Nothing on other cards.

The number in a case is that of MII_WGMMA: csrc/cuda/attention_hopper.cu says what each is.
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
    results = []
    for mode in ("1", "2", "3", "4"):
        os.environ["MII_WGMMA"] = mode  # the library asks for it at every launch
        results += run_cases(_cases(mode), device)
    os.environ.pop("MII_WGMMA")
    if before is not None:
        os.environ["MII_WGMMA"] = before
    return results


def _cases(mode: str) -> Iterator[Case]:
    for seqs, length in ((8, 2048), (2, 8192), (1, 32768)):
        yield prompt(f"{seqs} of {length}, wgmma {mode}", Work(((length, length),) * seqs))
    if mode > "2":
        return
    yield prompt(f"32 of 512, wgmma {mode}", Work(((512, 512),) * 32))
    yield prompt(f"8 of 2048, heads 32/32, wgmma {mode}", Work(((2048, 2048),) * 8, kv_heads=32))
    yield prompt(f"8 of 2048, heads of 64, wgmma {mode}", Work(((2048, 2048),) * 8, head_dim=64))
    yield prompt(f"8 of 2048, softcap, wgmma {mode}", Work(((2048, 2048),) * 8, softcap=50.0))
    yield prompt(f"2 of 8192, window 1024, wgmma {mode}", Work(((8192, 8192),) * 2, window=1024))
    yield prompt(f"chunk of 512 at 8192, wgmma {mode}", Work(((512, 8192),)))
    yield prompt(f"chunk of 512, 256 x 1 at 1024, wgmma {mode}", Work(((512, 2048), *(((1, 1024),) * 256))))
