"""The sampler on the logits of Llama-3-8B (128,256 tokens, bfloat16): a case for each kind of sampling and row count.

`bytes` counts one read of the logits, the least that any sampler needs. The logits are peaked as a language model is,
but for the cases called flat, where a nucleus holds about 60 thousand tokens: the worst case of top-p.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.timing import Call, Case, run_cases
from mii.batching.data_classes import SamplingParams
from mii.ops.sampler import SamplingTable, sample, sample_workspace

VOCABULARY, SIZE = 128256, 2  # tokens; bytes of a logit
GREEDY, PLAIN = SamplingParams(), SamplingParams(temperature=1.0)
NUCLEUS = SamplingParams(temperature=1.0, top_p=0.9)
TOP_K = SamplingParams(temperature=1.0, top_k=50, top_p=0.9)


def run(device: torch.device) -> list[dict[str, Any]]:
    return run_cases(_cases((1, 8, 64, 128, 512) if device.type == "cuda" else (1, 8, 64)), device)


def _cases(rows: tuple[int, ...]) -> Iterator[Case]:
    kinds = {
        "greedy": (GREEDY, True, False),
        "greedy with logprobs": (GREEDY, True, True),
        "temperature": (PLAIN, True, False),
        "top-p 0.9": (NUCLEUS, True, False),
        "top-p 0.9, flat": (NUCLEUS, False, False),
        "top-k 50, top-p 0.9": (TOP_K, True, False),
    }
    for text, kind in kinds.items():
        for n in rows:
            moved = n * VOCABULARY * SIZE
            yield Case("sampler", f"{text}, {n} rows", moved, lambda d, n=n, kind=kind: _sampler(d, n, *kind))


def _sampler(device: torch.device, rows: int, params: SamplingParams, peaked: bool, with_logprobs: bool) -> Call:
    logits = torch.randn(rows, VOCABULARY, device=device)
    if peaked:  # a bulk far below some hundred candidates
        logits = 2.5 * logits + 12 * (torch.rand_like(logits) > 0.999)
    logits = logits.bfloat16()
    table = SamplingTable.allocate(rows, device)
    table.assign(range(rows), [params] * rows)
    slots, positions = (torch.arange(rows, dtype=torch.int32, device=device) for _ in range(2))
    tokens, last_token = torch.zeros_like(slots), torch.zeros_like(slots)
    logprobs = torch.zeros(rows, device=device) if with_logprobs else None
    workspace = sample_workspace(rows, VOCABULARY, logits.dtype, device)
    return lambda: sample(
        tokens, logits, table, slots, positions, last_token=last_token, logprobs=logprobs, workspace=workspace
    )
