"""Log-probabilities where each rank has the logits of a part of the vocabulary; see `mii.ops.logits.score`."""

from __future__ import annotations

import torch

from mii.modeling.sharding import Span
from mii.ops.all_reduce import Group
from mii.ops.logits import Scores, best_of_rows, clean

_BLOCK = 1 << 20  # logits of all ranks that are looked at together
_NEVER = float("-inf")


def score_shards(logits: torch.Tensor, ids: torch.Tensor, k: int, span: Span, group: Group) -> Scores:
    """`score` on parts of the vocabulary; every rank gets the same.

    Args:
        logits: [rows, span.size], this rank's.
        ids: int32 or int64 [rows], the same on every rank.
        k: 0 to span.whole.
        span: the ids whose logits they are.
        group: the ranks, which hold the vocabulary in order.
    """
    step = max(1, _BLOCK // span.whole)
    pieces = [
        _score(clean(some), their.long(), k, span, group)
        for some, their in zip(logits.split(step), ids.split(step), strict=True)
    ]
    return Scores(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _score(values: torch.Tensor, ids: torch.Tensor, k: int, span: Span, group: Group) -> Scores:
    best = values.amax(1)
    finite = torch.where(best.isinf(), 0.0, best)
    total = (values - finite.unsqueeze(1)).exp().sum(1, dtype=torch.float64)
    here = (ids >= span.start) & (ids < span.stop)
    asked = values.gather(1, (ids - span.start).clamp(0, span.size - 1).unsqueeze(1)).squeeze(1)
    said = group.all_gather(torch.stack([best.double(), total, torch.where(here, asked, _NEVER).double()]))
    bests, totals = said[:, 0], said[:, 1]
    most = bests.amax(0)
    scale = torch.where(bests.isinf(), 0.0, (bests - most).exp())
    whole = torch.where(most.isinf(), most, (totals * scale).sum(0).log() + most).unsqueeze(1)
    top, top_ids = _merged(values, k, span, group)
    return Scores(_relative(said[:, 2].amax(0).unsqueeze(1), whole).squeeze(1), _relative(top, whole), top_ids.int())


def _merged(values: torch.Tensor, k: int, span: Span, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of all ranks and their ids, equal ones by id: ranks hold ids in order, and so does a stable
    sort.
    """
    mine = min(k, span.size)
    ids = best_of_rows(values, mine) if mine else values.new_empty((len(values), 0), dtype=torch.int64)
    missing = (0, k - mine)
    packed = torch.stack(
        [
            torch.nn.functional.pad(values.gather(1, ids), missing, value=_NEVER).view(torch.int32),
            torch.nn.functional.pad((ids + span.start).int(), missing, value=span.whole),
        ]
    )
    said = group.all_gather(packed)
    rows = len(values)
    top = said[:, 0].contiguous().view(torch.float32).permute(1, 0, 2).reshape(rows, -1)
    top_ids = said[:, 1].permute(1, 0, 2).reshape(rows, -1)
    # What only fills up comes behind tokens that are as unlikely.
    order = torch.argsort(top_ids >= span.whole, dim=1, stable=True)
    order = order.gather(1, torch.argsort(top.gather(1, order), dim=1, descending=True, stable=True))[:, :k]
    return top.gather(1, order), top_ids.gather(1, order)


def _relative(chosen: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    infinite = torch.where(chosen > 0, 0.0, _NEVER)
    return torch.where(chosen.isinf(), infinite, (chosen.double() - total)).float()
