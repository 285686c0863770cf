"""What requests ask of logits beyond sampling: log-probabilities, penalties, biases, masks. Plain torch on any device.

On a GPU nothing that runs in a step waits for the device or depends on values it finds there, so a graph can hold it.

Penalties change the float32 logits of each row, in this order:

1. repetition r (Keskar et al., "CTRL", 2019, 4.1): tokens of prompt or answer: l / r if l > 0, else l * r.
2. frequency f and presence p (as the OpenAI API defines them): tokens of the answer: l - f * count - p.
3. bias: added to the tokens it names.
4. allowed: every other token becomes -inf.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

# Logits that are looked at together: bounds the memory for what is made of them, some 30 bytes each. On a CPU what is
# made of them also stays in the cache.
_BLOCK = {"cpu": 1 << 17, "cuda": 1 << 22}


class Scores(NamedTuple):
    """What rows of logits say about tokens. Log-probabilities are those of the softmax, natural logarithms."""

    chosen: torch.Tensor  # float32 [rows]: of the token that was asked about
    top: torch.Tensor  # float32 [rows, k]: of the most probable tokens, best first
    top_ids: torch.Tensor  # int32 [rows, k]


def score(logits: torch.Tensor, ids: torch.Tensor, k: int) -> Scores:
    """The log-probability of one token in each row, and the k most probable ones.

    Exact: the best are found by logit, equal ones by id, so the first is the greedy token; sums are made in float64, so
    a result does not depend on how many rows there are. NaN counts as -inf. Where nothing is finite, +inf has 0 and
    -inf has -inf.

    Args:
        logits: float32, float16 or bfloat16 [rows, vocab].
        ids: int32 or int64 [rows].
        k: 0 to vocab. A smaller k gives the first of what a larger one gives.

    Raises:
        ValueError: k is out of range.

    Example:
        >>> score(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([0]), 2).top_ids
        tensor([[1, 2]], dtype=torch.int32)
    """
    rows, vocab = logits.shape
    if not 0 <= k <= vocab:
        raise ValueError(f"{k} log-probabilities were asked for; the vocabulary allows 0 to {vocab}.")
    out = Scores(
        torch.empty(rows, device=logits.device),
        torch.empty(rows, k, device=logits.device),
        torch.empty(rows, k, dtype=torch.int32, device=logits.device),
    )
    step = max(1, _BLOCK.get(logits.device.type, 1 << 20) // vocab)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        values = clean(logits[piece])
        total = _log_total(values)
        out.chosen[piece] = _relative(values, ids[piece].long().unsqueeze(1), total).squeeze(1)
        if k:
            best = best_of_rows(values, k)
            out.top[piece], out.top_ids[piece] = _relative(values, best, total), best
    return out


def best_of_rows(values: torch.Tensor, k: int) -> torch.Tensor:
    """Ids int64 [rows, k] of the k largest values of each row, equal ones by id."""
    if values.device.type != "cpu":
        return best_together(values, k)
    return torch.stack([_best_of_row(row, k) for row in values])


def best_together(values: torch.Tensor, k: int) -> torch.Tensor:
    """`best_of_rows` without a look at any value: a search for integers that hold value and id."""
    last = values.shape[1] - 1
    bits = (values + 0.0).view(torch.int32)  # -0 becomes +0: they are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    reverse_ids = torch.arange(last, -1, -1, device=values.device)
    return last - ((ordered.long() << 32) + reverse_ids).topk(k, dim=1).values.bitwise_and_(0xFFFFFFFF)


def _best_of_row(row: torch.Tensor, k: int) -> torch.Tensor:
    """All that reach the k-th largest value, in the order of ids, then sorted."""
    candidates = (row >= row.topk(k).values[-1]).nonzero().squeeze(1)
    return candidates[row[candidates].sort(descending=True, stable=True).indices[:k]]


def _log_total(values: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum of exponentials, float64 [rows, 1]."""
    best = values.amax(1, keepdim=True)
    total = (values - best).exp_().sum(1, keepdim=True, dtype=torch.float64).log_() + best
    return torch.where(best.isinf(), best, total)


def _relative(values: torch.Tensor, ids: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Log softmax at ids; 0 at +inf and -inf at -inf, also where nothing is finite."""
    chosen = values.gather(1, ids)
    infinite = torch.where(chosen > 0, 0.0, float("-inf"))
    return torch.where(chosen.isinf(), infinite, (chosen - total).float())


def clean(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().nan_to_num(float("-inf"), float("inf"), float("-inf"))


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Numbers of the host as a tensor on the device, without waiting for what the device still does."""
    if not values:
        return torch.empty(0, dtype=dtype, device=device)
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else host.to(device)


class PenaltyChoice(Protocol):
    """What one request asks: repetition 1, frequency 0 and presence 0 are off."""

    @property
    def repetition_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...


@dataclass(frozen=True)
class PenaltyTable:
    """Penalties of every slot and what the slots' requests have said so far, on the device.

    The two tables take 5 bytes for each slot and token of the vocabulary: make one when a request first needs it, with
    slots for the requests that have penalties only.

    Attributes:
        repetition, frequency, presence: float32 [slots].
        counts: int32 [slots, vocab], how often the answer holds each token.
        prompt: bool [slots, vocab], whether the prompt holds it.
    """

    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor
    counts: torch.Tensor
    prompt: torch.Tensor

    @classmethod
    def allocate(cls, slots: int, vocab: int, device: torch.device | str = "cpu") -> PenaltyTable:
        """A table of slots without penalties."""
        return cls(
            repetition=torch.ones(slots, device=device),
            frequency=torch.zeros(slots, device=device),
            presence=torch.zeros(slots, device=device),
            counts=torch.zeros(slots, vocab, dtype=torch.int32, device=device),
            prompt=torch.zeros(slots, vocab, dtype=torch.bool, device=device),
        )

    @property
    def slots(self) -> int:
        return self.repetition.shape[0]

    def grown(self, slots: int) -> PenaltyTable:
        """A table of more slots with all that this one holds."""
        device, vocab = self.counts.device, self.counts.shape[1]
        larger = PenaltyTable.allocate(slots, vocab, device)
        for name in ("repetition", "frequency", "presence", "counts", "prompt"):
            getattr(larger, name)[: self.slots] = getattr(self, name)
        return larger

    def assign(
        self, slot: int, choice: PenaltyChoice, prompt_ids: Sequence[int], answer_ids: Sequence[int] = ()
    ) -> None:
        """Starts a request in a slot; `answer_ids` are what it had said before it was preempted."""
        device = self.counts.device
        for name in ("repetition", "frequency", "presence"):
            getattr(self, name)[slot].fill_(getattr(choice, f"{name}_penalty"))
        self.prompt[slot].fill_(False).index_fill_(0, upload(prompt_ids, torch.int64, device), True)
        answer = upload(answer_ids, torch.int64, device)
        self.counts[slot].zero_().scatter_add_(0, answer, torch.ones_like(answer, dtype=torch.int32))

    def record(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Counts one new token for each row; rows with slot -1 and tokens outside the table count nothing. Both int32
        [rows].
        """
        columns = self.counts.shape[1]
        active = (slots >= 0) & (tokens >= 0) & (tokens < columns)
        index = torch.where(active, slots.long() * columns + tokens, 0)
        self.counts.view(-1).scatter_add_(0, index, active.int())


class Bias(NamedTuple):
    """Sparse additions to logits: `values[i]` to token `ids[i]` of row `rows[i]`; entries of one place add up.

    To keep the shape of a step, pad with zeros: row 0, id 0, value 0.
    """

    rows: torch.Tensor  # int64 [entries]
    ids: torch.Tensor  # int64 [entries]
    values: torch.Tensor  # float32 [entries]

    @classmethod
    def of(cls, biases: Iterable[Mapping[int, float]], vocab: int, device: torch.device | str = "cpu") -> Bias:
        """From a mapping of token to bias for each row.

        Raises:
            ValueError: a token is not in the vocabulary.
        """
        entries = [(row, token, value) for row, bias in enumerate(biases) for token, value in bias.items()]
        for _, token, _ in entries:
            if not 0 <= token < vocab:
                raise ValueError(f"logit_bias names token {token}; the vocabulary has tokens 0 to {vocab - 1}.")
        rows, ids, values = zip(*entries, strict=True) if entries else ((), (), ())
        return cls(
            upload(rows, torch.int64, device), upload(ids, torch.int64, device), upload(values, torch.float32, device)
        )


def apply_penalties(
    out: torch.Tensor,
    logits: torch.Tensor,
    slots: torch.Tensor,
    *,
    table: PenaltyTable | None = None,
    bias: Bias | None = None,
    allowed: torch.Tensor | None = None,
) -> None:
    """Writes the logits as the requests' penalties, biases and masks make them; see the module for what they do.

    Args:
        out: float32 [rows, vocab]: a bfloat16 logit of 20 has steps of an eighth, too coarse for small penalties.
        logits: float32, float16 or bfloat16 [rows, vocab]; may be `out`.
        slots: int32 [rows], the slot of each row in `table`; -1 is padding, whose result means nothing.
        table: penalties by slot.
        bias: additions by row.
        allowed: bool [rows, vocab]; a row of padding or without a mask is all True.

    Raises:
        ValueError: `out` is not float32 of the logits' shape.
    """
    if out.dtype != torch.float32 or out.shape != logits.shape:
        raise ValueError(
            f"out must be float32 of shape {list(logits.shape)}, as the logits; it is {out.dtype} of {list(out.shape)}."
        )
    out.copy_(logits)
    if table is not None:
        _penalize(out, table, slots.long().clamp(min=0))
    if bias is not None:
        out.index_put_((bias.rows, bias.ids), bias.values, accumulate=True)
    if allowed is not None:
        out.masked_fill_(~allowed, float("-inf"))


def _penalize(out: torch.Tensor, table: PenaltyTable, slots: torch.Tensor) -> None:
    if out.device.type == "cpu":
        for row, slot in zip(out, slots.tolist(), strict=True):
            _penalize_seen(row, table, slot)
        return
    penalize_together(out, table, slots)


def penalize_together(out: torch.Tensor, table: PenaltyTable, slots: torch.Tensor) -> None:
    """The penalties of `apply_penalties` without a look at any value, in place; `slots` int64, none negative."""
    strengths = (column[slots].unsqueeze(1) for column in (table.repetition, table.frequency, table.presence))
    out.copy_(_penalized(out, table.counts[slots], table.prompt[slots], *strengths))


def _penalize_seen(row: torch.Tensor, table: PenaltyTable, slot: int) -> None:
    """One row in the host's memory: only the tokens that the request has seen change."""
    counts, prompt = table.counts[slot], table.prompt[slot]
    seen = (counts.bool() | prompt).nonzero().squeeze(1)
    strengths = (column[slot] for column in (table.repetition, table.frequency, table.presence))
    row[seen] = _penalized(row[seen], counts[seen], prompt[seen], *strengths)


def _penalized(
    logits: torch.Tensor,
    counts: torch.Tensor,
    prompt: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    said = counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(said | prompt, repeated, logits) - (frequency * counts + presence * said)
