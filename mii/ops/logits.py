"""What requests ask of logits beyond sampling: log-probabilities, penalties, biases, masks. Plain torch on any device.

What runs in a step neither waits for the device nor depends on values it finds there, so a CUDA graph can hold it.

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


def top_logprobs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens of every row with their log-probabilities.

    Exact: by logit, equal ones by id, so the first is the greedy token. NaN counts as -inf.

    Args:
        logits: float32, float16 or bfloat16 [rows, vocab].
        k: 1 to vocab.

    Returns:
        Log softmax in float32 [rows, k], best first, and ids int32 [rows, k].

    Raises:
        ValueError: k is out of range.

    Example:
        >>> top_logprobs(torch.tensor([[0.0, 1.0, 1.0]]), 2)[1]
        tensor([[1, 2]], dtype=torch.int32)
    """
    vocab = logits.shape[1]
    if not 1 <= k <= vocab:
        raise ValueError(f"{k} log-probabilities were asked for; the vocabulary allows 1 to {vocab}.")
    values = _clean(logits)
    bits = (values + 0.0).view(torch.int32)  # -0 becomes +0: they are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    last_ids = torch.arange(vocab - 1, -1, -1, device=logits.device)
    best = ((ordered.long() << 32) + last_ids).topk(k, dim=1).values
    ids = vocab - 1 - (best & 0xFFFFFFFF)
    return _relative(values, ids), ids.int()


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log softmax of each row at one token, float32 [rows].

    Args:
        logits: float32, float16 or bfloat16 [rows, vocab]; NaN counts as -inf.
        ids: int32 or int64 [rows].
    """
    return _relative(_clean(logits), ids.long().unsqueeze(1)).squeeze(1)


def _relative(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log softmax at ids; 0 at +inf and -inf at -inf, also where nothing is finite."""
    chosen = values.gather(1, ids)
    infinite = torch.where(chosen > 0, 0.0, float("-inf"))
    return torch.where(chosen.isinf(), infinite, chosen - values.logsumexp(1, keepdim=True))


def _clean(logits: torch.Tensor) -> torch.Tensor:
    values = logits.float()
    return values.masked_fill(values.isnan(), float("-inf"))


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

    The two tables take 5 bytes for each slot and token of the vocabulary: make one when a request first needs it.

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

    def assign(
        self, slot: int, choice: PenaltyChoice, prompt_ids: Sequence[int], answer_ids: Sequence[int] = ()
    ) -> None:
        """Starts a request in a slot; `answer_ids` are what it had said before it was preempted."""
        device, vocab = self.counts.device, self.counts.shape[1]
        for name in ("repetition", "frequency", "presence"):
            getattr(self, name)[slot] = getattr(choice, f"{name}_penalty")
        self.prompt[slot] = False
        self.prompt[slot, torch.tensor(prompt_ids, dtype=torch.int64, device=device)] = True
        answer = torch.tensor(answer_ids, dtype=torch.int64, device=device)
        self.counts[slot] = torch.bincount(answer, minlength=vocab).int()

    def record(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Counts one new token for each row; rows with slot -1 count nothing. Both int32 [rows]."""
        active = slots >= 0
        index = torch.where(active, slots.long() * self.counts.shape[1] + tokens, 0)
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
        places = torch.tensor([rows, ids], dtype=torch.int64).to(device)
        return cls(places[0], places[1], torch.tensor(values, dtype=torch.float32).to(device))


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
    repetition, frequency, presence = (
        column[slots].unsqueeze(1) for column in (table.repetition, table.frequency, table.presence)
    )
    counts = table.counts[slots]
    said = counts > 0
    repeated = torch.where(out > 0, out / repetition, out * repetition)
    out.copy_(torch.where(said | table.prompt[slots], repeated, out))
    out.sub_(frequency * counts + presence * said)
