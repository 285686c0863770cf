"""Tokens that are not drawn from the model's own logits: penalties, biases, allowed tokens, ends that are held back.

A step draws a token for every row as it always does, in its graph or recording. Then the rows of requests that change
their logits are drawn again, from copies that are changed, and these tokens take the place of the first ones on the
device, before anything reads them. So a step without such rows is what it always was, and none of them depends on who
else is in the step. Answers are counted on the device too, since the host may be a token behind.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mii.engine.sampling import Sampler
from mii.engine.sequence import Sequence
from mii.modeling.sharding import Span
from mii.ops.logits import Bias, PenaltyTable, apply_penalties, upload
from mii.ops.prepare import StepTensors
from mii.ops.shard_sampler import Draws

# Logits that are changed together: bounds the memory for the copies, some 30 bytes for each.
_BLOCK = 1 << 22
_FEWEST_PENALTIES = 8


class EditedRow(NamedTuple):
    """A row of a step's logits to draw again; `held`: its sequence may not end yet."""

    row: int
    sequence: Sequence
    held: bool


class PenaltyRows:
    """Rows of a penalty table for the sequences that have penalties and a slot; row 0 has none, for all others.

    A sequence gets its row when it first samples after it was given a slot, and loses it with the slot, so what the row
    counts then are all tokens that the host knows and, from there on, what the device drew.
    """

    def __init__(self, vocab: Span, device: torch.device) -> None:
        self._vocab = vocab
        self.table = PenaltyTable.allocate(_FEWEST_PENALTIES, vocab.size, device)
        self._owners: list[tuple[Sequence, int] | None] = [None] * (_FEWEST_PENALTIES - 1)
        self._row_of: dict[int, int] = {}

    def row(self, sequence: Sequence) -> int:
        """The row of a sequence, made if it has none."""
        row = self._row_of.get(sequence.ticket)
        return self._start(sequence) if row is None else row

    def _start(self, sequence: Sequence) -> int:
        row = self._free_row()
        self._owners[row - 1] = (sequence, sequence.ticket)
        self._row_of[sequence.ticket] = row
        length = sequence.prompt_length
        prompt, answer = (self._vocab.local(ids) for ids in (sequence.tokens[:length], sequence.tokens[length:]))
        self.table.assign(row, sequence.sampling, prompt, answer)
        return row

    def _free_row(self) -> int:
        if None not in self._owners:
            self._reclaim()
        if None not in self._owners:
            self._owners += [None] * (len(self._owners) + 1)
            self.table = self.table.grown(len(self._owners) + 1)
        return self._owners.index(None) + 1

    def _reclaim(self) -> None:
        """Frees the rows of sequences that ended or lost their slot."""
        for index, owner in enumerate(self._owners):
            if owner is not None and not holds_slot(*owner):
                del self._row_of[owner[1]]
                self._owners[index] = None


def holds_slot(sequence: Sequence, ticket: int) -> bool:
    """Whether a sequence still has the slot that it was given with `ticket`."""
    return sequence.slot >= 0 and sequence.ticket == ticket


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows that are drawn again together, on the device; `penalties` are -1 where there are none."""

    rows: torch.Tensor  # int64 [n]
    slots: torch.Tensor  # int32 [n]
    penalties: torch.Tensor | None  # int32 [n]
    bias: Bias | None
    allowed: torch.Tensor | None  # bool [n, vocab]
    draws: Draws | None


class LogitsProcessor:
    """Draws again what must not come from the model's own logits.

    Args:
        sampler: Draws the tokens; its part of the vocabulary is what the logits have columns for.
        device: Where the logits are.
    """

    def __init__(self, sampler: Sampler, device: torch.device) -> None:
        self._sampler, self._vocab, self._device = sampler, sampler.vocab, device
        self._at_once = max(1, _BLOCK // self._vocab.whole)
        self._changed = torch.empty(self._at_once, self._vocab.size, device=device)
        self._workspace = sampler.workspace(self._at_once, torch.float32, device)
        self._penalties: PenaltyRows | None = None
        self._key: list[tuple[int, int, bool]] = []
        self._batches: list[_Batch] = []

    def draw(
        self, edited: SequenceOf[EditedRow], logits: torch.Tensor, tokens: torch.Tensor, step: StepTensors
    ) -> None:
        """Replaces the tokens of some rows.

        Args:
            edited: The rows.
            logits: [samples, vocab], the model's; they stay as they are.
            tokens: int32 [samples], what was drawn from them; in and out.
            step: Whose `last_token` is replaced too.
        """
        key = [(row, sequence.ticket, held) for row, sequence, held in edited]
        if key != self._key:  # else the same requests decode on: what the device has of them still holds
            starts = range(0, len(edited), self._at_once)
            self._batches = [self._batch(edited[start : start + self._at_once]) for start in starts]
            self._key = key
        for batch in self._batches:
            self._draw(batch, logits, tokens, step)

    def _draw(self, batch: _Batch, logits: torch.Tensor, tokens: torch.Tensor, step: StepTensors) -> None:
        table = self._penalties.table if self._penalties is not None and batch.penalties is not None else None
        changed = self._changed[: len(batch.rows)]
        rows = batch.slots if batch.penalties is None else batch.penalties
        own = logits.index_select(0, batch.rows)
        apply_penalties(changed, own, rows, table=table, bias=batch.bias, allowed=batch.allowed)
        drawn = torch.empty_like(batch.slots)
        positions = step.sample_positions.index_select(0, batch.rows)
        self._sampler.sample(
            drawn, changed, batch.slots, positions,
            draws=batch.draws, last_token=step.last_token, workspace=self._workspace,
        )  # fmt: skip
        tokens.index_copy_(0, batch.rows, drawn)
        if table is not None:
            table.record(rows, drawn - self._vocab.start)

    def _batch(self, edited: SequenceOf[EditedRow]) -> _Batch:
        penalties = [self._penalty_row(each.sequence) for each in edited]
        biases = [_biases(each, self._vocab) for each in edited]
        return _Batch(
            rows=upload([each.row for each in edited], torch.int64, self._device),
            slots=upload([each.sequence.slot for each in edited], torch.int32, self._device),
            penalties=upload(penalties, torch.int32, self._device) if max(penalties) > 0 else None,
            bias=Bias.of(biases, self._vocab.size, self._device) if any(biases) else None,
            allowed=self._allowed([each.sequence.sampling.allowed_ids for each in edited]),
            draws=self._sampler.plan(each.sequence.sampling for each in edited),
        )

    def _penalty_row(self, sequence: Sequence) -> int:
        if not sequence.sampling.penalizes:
            return -1
        if self._penalties is None:
            self._penalties = PenaltyRows(self._vocab, self._device)
        return self._penalties.row(sequence)

    def _allowed(self, rows: list[tuple[int, ...]]) -> torch.Tensor | None:
        """The mask of what each row may yield; a row without a list may yield all."""
        if not any(rows):
            return None
        vocab = self._vocab
        mask = upload([not ids for ids in rows], torch.bool, self._device).unsqueeze(1).repeat(1, vocab.size)
        places = [row * vocab.size + token for row, ids in enumerate(rows) for token in vocab.local(ids)]
        mask.view(-1).index_fill_(0, upload(places, torch.int64, self._device), True)
        return mask


def _biases(edited: EditedRow, vocab: Span) -> dict[int, float]:
    """What is added to a row's logits: the request's biases, and -inf to the tokens that would end it too early."""
    bias = edited.sequence.sampling.logit_bias
    if edited.held:
        bias = {**bias, **dict.fromkeys(edited.sequence.request.stop_ids, float("-inf"))}
    return {token - vocab.start: value for token, value in bias.items() if vocab.start <= token < vocab.stop}
