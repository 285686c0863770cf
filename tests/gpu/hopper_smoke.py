"""First steps of the Hopper kernel: one head, inputs whose right answer can be read off, and a map of what is wrong.

    timeout 30 python -m tests.gpu.hopper_smoke WGMMA [TOKENS HEAD_DIM]

WGMMA is the value for MII_WGMMA. Without a size it goes through a few and ends with code 1 at the first that is wrong.
Each probe makes one part of the layout visible: `columns` (weights uniform, value = its column), `keys` (value = its
key), `scores` (each row sees one key, and the result is that key's number), `random`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch

from tests.ops.attention_cases import SENTINEL, TOLERANCE, Case, Shape, make_case

SIZES = ((128, 128), (64, 128), (20, 128), (128, 64), (129, 128), (256, 128), (300, 128), (300, 64), (1000, 128))


def main(arguments: list[str]) -> int:
    os.environ["MII_WGMMA"] = arguments[0]
    sizes = [(int(arguments[1]), int(arguments[2]))] if len(arguments) > 1 else SIZES
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, head_dim in sizes:
            for name, case in probes(tokens, head_dim, dtype):
                out = case.run_native()
                torch.cuda.synchronize()
                report = differences(out[: case.rows].float().cpu(), case.reference()[: case.rows].cpu(), dtype)
                title = f"{str(dtype).removeprefix('torch.')}, {tokens} tokens, head of {head_dim}, {name}"
                print(f"{title}: {'right' if not report else 'WRONG'}", *report, sep="\n  ", flush=True)
                if report:
                    return 1
    return 0


def probes(tokens: int, head_dim: int, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (tokens, head_dim), generator=generator) * 2.0 - 1
    column = torch.arange(head_dim).float().expand(tokens, -1)
    key = (torch.arange(tokens).float() % 128).unsqueeze(1).expand(-1, head_dim)
    nothing = torch.zeros(tokens, head_dim)
    yield "columns", _case(tokens, head_dim, dtype, nothing, codes, column)
    yield "keys", _case(tokens, head_dim, dtype, nothing, codes, key)
    yield "scores", _case(tokens, head_dim, dtype, 4 * codes[torch.arange(tokens) // 2], codes, key)
    shape = Shape(q_heads=1, kv_heads=1, head_dim=head_dim, block_size=64, dtype=dtype, device="cuda")
    yield "random", make_case([(tokens, tokens)], shape)


def _case(tokens: int, head_dim: int, dtype: torch.dtype, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Case:
    shape = Shape(q_heads=1, kv_heads=1, head_dim=head_dim, block_size=64, dtype=dtype, device="cuda")
    case = make_case([(tokens, tokens)], shape)
    table = case.batch.block_table[case.batch.seq_slot[0]].tolist()
    case.q = case.q.clone()
    case.q[:tokens] = q.to(case.q)
    for cache, rows in ((case.k_cache, k), (case.v_cache, v)):
        for start in range(0, tokens, 64):
            part = rows[start : start + 64]
            cache[table[start // 64], 0, : len(part)] = part.to(cache)
    return case


def differences(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> list[str]:
    """Nothing where all is right; else a map of wrong elements by 8 rows x 8 columns, and the first rows of numbers."""
    wrong = ~((got - expected).abs() <= TOLERANCE[dtype] * (1 + expected.abs()))
    if not bool(wrong.any()):
        return []
    rows = wrong.any(1).nonzero().flatten().tolist()
    largest = float((got - expected).abs().nan_to_num(9e9).max())
    lines = [
        f"{int(wrong.sum())} of {wrong.numel()} elements in {len(rows)} rows, off by up to {largest:.4g}",
        f"{int(got.isnan().sum())} are NaN, {int((got == SENTINEL).sum())} were not written",
        "wrong elements by 8 rows (down) and 8 columns (across), '.' none, '#' all:",
    ]
    for start in range(0, min(len(got), 320), 8):
        counts = [int(part.sum()) for part in wrong[start : start + 8].split(8, dim=1)]
        size = wrong[start : start + 8, :8].numel()
        lines.append(f"rows {start:4d}: " + "".join("." if c == 0 else "#" if c == size else "+" for c in counts))
    for row in sorted({rows[0], rows[len(rows) // 2], rows[-1], 0, 1, 8, 16, 64} & set(range(len(got)))):
        lines += [f"row {row} got      {_numbers(got[row])}", f"row {row} expected {_numbers(expected[row])}"]
    return lines


def _numbers(row: torch.Tensor) -> str:
    return " ".join(f"{x:.4g}" for x in row[: 40 if len(row) > 40 else None].tolist())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
