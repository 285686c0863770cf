"""`mii.ops.shard_sampler` by the CUDA library: a kernel for each stage, and an exchange of the ranks after each.

What the ranks exchange for a row is a few numbers, and for a threshold three histograms (26 KB).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mii.modeling.sharding import Span
from mii.ops import abi, native
from mii.ops.all_reduce import Group

if TYPE_CHECKING:
    from mii.ops.shard_sampler import Draws

_STATE_BYTES = 24
_BINS = (1280, 1024, 1024)  # of a distance's digits
_BLOCK = 128  # rows that exchange histograms at once: bounds the memory


def sample_by_stages(sample: Any, device: torch.device, *, span: Span, group: Group, draws: Draws) -> bool:
    """Draws the tokens of a `abi.MiiSample`; False: there is no kernel for it, on any rank, and nothing was done.

    Args:
        sample: its logits and vocabulary are this rank's.
        device: of all tensors.
        span: the ids of these logits.
        group: the ranks.
        draws: what the rows ask for.
    """
    library = native.library(device)
    if library is None or not library.has("mii_sample_shard"):
        return False
    args = abi.MiiSampleShard(sample=sample, first=span.start, whole=span.whole, rank=group.rank, size=group.size)
    step = _BLOCK if draws.top_k or draws.top_p else max(1, sample.rows)
    state = torch.empty(min(step, sample.rows) * _STATE_BYTES, dtype=torch.uint8, device=device)
    args.state = state.data_ptr()
    for start in range(0, sample.rows, step):
        args.start, args.rows = start, min(step, sample.rows - start)
        if not _sample_rows(library, args, device, group, draws):
            return False
    return True


def _sample_rows(library: native.Library, args: Any, device: torch.device, group: Group, draws: Draws) -> bool:
    args.takes, args.gathered = abi.SHARD_NOTHING, None
    for stage in _stages(draws):
        out = _given(stage, args.rows, device)
        args.gives, args.out = stage, native.pointer(out)
        if not library.call("mii_sample_shard", args, native.stream(device)):
            return False
        if out is not None:
            gathered = group.all_gather(out)
            args.takes, args.gathered = stage, gathered.data_ptr()
    return True


def _stages(draws: Draws) -> Iterator[int]:
    yield abi.SHARD_BEST
    if draws.random:
        if draws.top_k:
            yield from range(abi.SHARD_COUNTS, abi.SHARD_COUNTS + len(_BINS))
        if draws.top_p:
            yield from range(abi.SHARD_WEIGHTS, abi.SHARD_WEIGHTS + len(_BINS))
        yield abi.SHARD_KEPT
        yield abi.SHARD_DRAWN
    yield abi.SHARD_TOKEN


def _given(stage: int, rows: int, device: torch.device) -> torch.Tensor | None:
    """What a rank gives in a stage, still to be filled."""
    if stage == abi.SHARD_TOKEN:
        return None
    if stage == abi.SHARD_BEST:
        return torch.empty(2, rows, dtype=torch.int32, device=device)
    if stage == abi.SHARD_DRAWN:
        return torch.empty(rows, dtype=torch.int32, device=device)
    if stage == abi.SHARD_KEPT:
        return torch.empty(rows, dtype=torch.int64, device=device)
    return torch.empty(rows, _BINS[(stage - abi.SHARD_COUNTS) % len(_BINS)], dtype=torch.int64, device=device)
