"""Draws tokens from logits: from all of them, or on each rank of a group from those of its part of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from mii.modeling.sharding import Span
from mii.ops import native
from mii.ops.all_reduce import Group
from mii.ops.sampler import SamplingChoice, SamplingTable, sample, sample_workspace
from mii.ops.shard_sampler import Draws, sample_shards


class Sampler:
    """Samples the rows of a step.

    Args:
        table: Parameters of the slots.
        vocab: The tokens whose logits this rank has.
        group: The ranks that have the others; None: there are no others.
    """

    def __init__(self, table: SamplingTable, vocab: Span, group: Group | None) -> None:
        self.table, self.vocab = table, vocab
        self.group = None if vocab.is_whole else group

    def plan(self, choices: Iterable[SamplingChoice]) -> Draws | None:
        """What a step with these requests has to exchange between ranks; None without others."""
        return None if self.group is None else Draws.of(choices)

    @property
    def usual(self) -> tuple[Draws | None, ...]:
        """What most steps have to exchange: of greedy requests, and of those that leave sampling to the defaults."""
        return (None,) if self.group is None else (Draws(), Draws(random=True, top_p=True))

    def workspace(self, rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Scratch memory for up to `rows` rows."""
        return sample_workspace(rows, self.vocab.whole, dtype, device) if self.group is None else None

    def sample(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        *,
        draws: Draws | None,
        counts: torch.Tensor | None = None,
        last_token: torch.Tensor | None = None,
        suppress: torch.Tensor | None = None,
        suppress_ids: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """Draws a token for each row; arguments as in `mii.ops.sampler.sample`, `draws` from `plan`."""
        if self.group is None:
            sample(
                tokens, logits, self.table, slots, positions, counts=counts, last_token=last_token,
                suppress=suppress, suppress_ids=suppress_ids, workspace=workspace,
            )  # fmt: skip
            return
        assert draws is not None
        work = partial(
            sample_shards,
            tokens, logits, self.table, slots, positions, span=self.vocab, group=self.group, draws=draws,
            counts=counts, last_token=last_token, suppress=suppress, suppress_ids=suppress_ids,
        )  # fmt: skip
        native.aside(work)
