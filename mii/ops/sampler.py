"""Sampling: one token for each row of logits, by temperature, top-k, min-p, top-p and a seeded draw, without a sort.

All bodies (this reference, the CPU library, the CUDA library) do the same integer arithmetic, so they draw the same
token bit for bit, and neither the batch, the row's place in it, nor the number of threads can change a draw:

1. distance   X = trunc((max - logit) * (2^25 log2 e / temperature)), capped at 40 * 2^25: how many octaves a token
   is less probable than the best one, in fixed point. Each operation rounds to float32, none is fused.
2. weight     w = 2^(40 - X / 2^25) as an integer, from a polynomial of degree 5 (relative error 2.5e-7). Sums of
   weights are exact in any order. A token less than 2^-40 as probable as the best one weighs 0 and is never drawn.
3. filters    each keeps the tokens with X <= threshold. top-k: the k-th smallest X (ties stay). min-p: -log2(min_p) in
   fixed point. top-p: the smallest X up to which the kept weights reach top_p of their total (ties stay). The kernels
   find these thresholds by histograms of X, most significant bits first (radix selection); the reference sorts.
4. draw       u = floor(R * total / 2^62) with R the 62 Philox bits of (seed, position); the token is the first, in the
   order of ids, whose running sum of kept weights exceeds u (inversion of the distribution function; Devroye,
   "Non-Uniform Random Variate Generation", 1986, III.2).

NaN counts as -inf. A row with no finite logit yields the lowest id among its largest logits (all -inf or NaN: the
lowest id that is not suppressed; +inf: the lowest id that holds it).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mii.ops import abi, native
from mii.ops.philox import random62

UNIT_BITS = 25  # X counts 2^-25 octaves
LIMIT = 40 << UNIT_BITS  # distance from which a weight is 0
MAX_VOCAB = 1 << 22  # keeps every sum of weights below 2^62
_SCALE = 48408812.0  # 2^25 log2 e, a float32
_MAX_SCALE = 1e30  # a temperature near 0 stays finite, so that the best token keeps distance 0
_POLYNOMIAL = (  # 2^-f on [0, 1], highest power first; the constant is exactly 1
    -0.0009449038770981133,
    0.009205798618495464,
    -0.0552973598241806,
    0.2401801496744156,
    -0.6931437253952026,
    1.0,
)
_BLOCK = 1 << 21  # logits that the reference handles at once: bounds its memory


class SamplingChoice(Protocol):
    """What one request asks of the sampler; `mii.batching.data_classes.SamplingParams` is one."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class SamplingTable:
    """Sampling parameters of every slot, on the device: tensors of shape [slots].

    Attributes:
        temperature: float32; 0 (or below) is greedy.
        top_p: float32; 1 is off.
        min_p: float32; 0 is off.
        top_k: int32; 0 is off.
        seed: int64; with the position it decides the draw.
        storage: int32 [6 * slots], the memory behind the five.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    seed: torch.Tensor
    storage: torch.Tensor

    @classmethod
    def allocate(cls, slots: int, device: torch.device | str = "cpu") -> SamplingTable:
        """A table of greedy slots.

        >>> SamplingTable.allocate(2).top_p
        tensor([1., 1.])
        """
        storage = torch.zeros(6 * slots, dtype=torch.int32, device=device)
        seed, rest = storage[: 2 * slots].view(torch.int64), storage[2 * slots :].view(4, slots)
        floats = rest[:3].view(torch.float32)
        table = cls(floats[0], floats[1], floats[2], rest[3], seed, storage)
        table.top_p.fill_(1.0)
        return table

    @property
    def slots(self) -> int:
        return self.seed.shape[0]

    def assign(self, slots: Sequence[int], choices: Iterable[SamplingChoice]) -> None:
        """Writes the parameters of these slots: one small copy to the device and one kernel, however many slots.

        Args:
            slots: distinct rows of the table.
            choices: as many parameter sets, in the same order.
        """
        chosen = list(choices)
        if len(chosen) != len(slots):
            raise ValueError(
                f"{len(slots)} slots were given with {len(chosen)} parameter sets; give one for each slot."
            )
        index = np.array(slots, np.int64).reshape(-1, 1) * _STRIDES + _FIELDS * self.slots + _HALVES
        values = _packed(chosen)
        if not self.storage.is_cuda:
            self.storage.numpy()[index] = values
            return
        # Pinned, so that nobody waits for what the device still does.
        packed = torch.from_numpy(np.concatenate([index.view(np.int32).ravel(), values.ravel()])).pin_memory()
        sent = packed.to(self.storage.device, non_blocking=True)
        self.storage.index_copy_(0, sent[: 2 * index.size].view(torch.int64), sent[2 * index.size :])


# Where the six words of a slot lie in `SamplingTable.storage`: two of the seed, then one of each other column.
_STRIDES, _FIELDS, _HALVES = np.array([[2, 2, 1, 1, 1, 1], [0, 0, 2, 3, 4, 5], [0, 1, 0, 0, 0, 0]])


def _packed(choices: Sequence[SamplingChoice]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The six words of each."""
    values = np.empty((len(choices), len(_STRIDES)), np.int32)
    values[:, :2] = np.array([_signed64(each.seed) for each in choices], np.int64).reshape(-1, 1).view(np.int32)
    with np.errstate(over="ignore"):  # infinite is as good as huge
        floats = np.array([(each.temperature, each.top_p, each.min_p) for each in choices], np.float32)
    values[:, 2:5] = floats.reshape(-1, 3).view(np.int32)
    values[:, 5] = [min(each.top_k, 2**31 - 1) for each in choices]
    return values


def _signed64(seed: int) -> int:
    """The seed's low 64 bits as a signed number."""
    return (seed & (2**64 - 1)) - ((seed & 2**63) << 1)


def sample(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    params: SamplingTable,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    counts: torch.Tensor | None = None,
    last_token: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    suppress: torch.Tensor | None = None,
    suppress_ids: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """Draws one token for each row of `logits`; see the module for the method. Rows of padding stay untouched.

    Args:
        tokens: int32 [rows], out.
        logits: float32, float16 or bfloat16 [rows, vocab], any row stride.
        params: parameters by slot.
        slots: int32 [rows], the slot of each row; -1 skips the row.
        positions: int32 [rows], index of the token about to be sampled.
        counts: int32 [8]; only the first counts[2] rows are sampled. None: all rows.
        last_token: int32 [slots], out: last_token[slot] = token.
        logprobs: float32 [rows], out: log softmax of the raw logits (suppressed ones left out) at the token.
        suppress: int32 [rows], non-zero: this row never yields one of `suppress_ids`.
        suppress_ids: int32 [any].
        workspace: as `sample_workspace` makes it, for one call at a time; None allocates one in this call.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(tokens, logits, slots, positions, suppress, suppress_ids)
    library = native.library(logits.device)
    if library is not None and library.has("mii_sample"):
        args = sample_arguments(
            tokens, logits, params, slots, positions, counts=counts, last_token=last_token, suppress=suppress,
            suppress_ids=suppress_ids,
        )  # fmt: skip
        if workspace is None:
            workspace = _allocate_workspace(library, args, logits.device)
        args.logprobs, args.workspace = native.pointer(logprobs), native.pointer(workspace)
        if library.call("mii_sample", args, native.stream(logits.device)):
            return
    sample_reference(
        tokens, logits, params, slots, positions, counts=counts, last_token=last_token, logprobs=logprobs,
        suppress=suppress, suppress_ids=suppress_ids,
    )  # fmt: skip


def _check(
    tokens: torch.Tensor, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor,
    suppress: torch.Tensor | None, suppress_ids: torch.Tensor | None,
) -> None:  # fmt: skip
    rows, vocab = logits.shape
    if logits.dtype not in abi.DTYPE_CODES or (logits.stride(1) != 1 and vocab > 1):
        raise ValueError(f"logits must be float32, float16 or bfloat16 with contiguous rows; they are {logits.dtype}.")
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"logits have {vocab} columns; the sampler takes a vocabulary of 1 to {MAX_VOCAB}.")
    for name, tensor in (("tokens", tokens), ("slots", slots), ("positions", positions), ("suppress", suppress)):
        if tensor is not None and (tensor.dtype != torch.int32 or tensor.shape != (rows,)):
            raise ValueError(
                f"{name} must be int32 of shape [{rows}], one for each row of logits; "
                f"it is {tensor.dtype} of shape {list(tensor.shape)}."
            )
    if suppress is not None and (suppress_ids is None or suppress_ids.dtype != torch.int32):
        raise ValueError("suppress flags rows that must not yield suppress_ids: give those ids too, as int32.")


def sample_arguments(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    params: SamplingTable,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    counts: torch.Tensor | None,
    last_token: torch.Tensor | None,
    suppress: torch.Tensor | None,
    suppress_ids: torch.Tensor | None,
) -> Any:
    """The arguments of `sample` as an `abi.MiiSample`, without log probabilities and workspace."""
    args = abi.MiiSample(
        tokens=tokens.data_ptr(),
        logits=logits.data_ptr(),
        slots=slots.data_ptr(),
        positions=positions.data_ptr(),
        counts=native.pointer(counts),
        last_token=native.pointer(last_token),
        temperature=params.temperature.data_ptr(),
        top_p=params.top_p.data_ptr(),
        min_p=params.min_p.data_ptr(),
        top_k=params.top_k.data_ptr(),
        seed=params.seed.data_ptr(),
        rows=logits.shape[0],
        vocab=logits.shape[1],
        logits_stride=logits.stride(0),
        dtype=abi.DTYPE_CODES[logits.dtype],
    )
    if suppress is not None and suppress_ids is not None:
        args.suppress, args.suppress_ids = suppress.data_ptr(), suppress_ids.data_ptr()
        args.num_suppress = suppress_ids.numel()
    return args


def _allocate_workspace(library: native.Library, args: ctypes.Structure, device: torch.device) -> torch.Tensor | None:
    size = library.bytes("mii_sample_workspace_bytes", args)
    return torch.zeros(size, dtype=torch.uint8, device=device) if size else None


def sample_workspace(rows: int, vocab: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor | None:
    """Scratch memory for `sample` with up to `rows` rows, zeroed as its first use needs; None where no body uses it."""
    device = torch.device(device)
    library = native.library(device)
    if library is None or not library.has("mii_sample_workspace_bytes"):
        return None
    args = abi.MiiSample(rows=rows, vocab=vocab, logits_stride=vocab, dtype=abi.DTYPE_CODES[dtype])
    return _allocate_workspace(library, args, device)


def sample_reference(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    params: SamplingTable,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    counts: torch.Tensor | None = None,
    last_token: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    suppress: torch.Tensor | None = None,
    suppress_ids: torch.Tensor | None = None,
) -> None:
    """`sample` in plain torch, on any device."""
    rows = logits.shape[0]
    active = slots >= 0
    if counts is not None:
        active &= torch.arange(rows, device=logits.device) < counts[abi.NUM_SAMPLES]
    step = max(1, _BLOCK // logits.shape[1])
    for start in range(0, rows, step):
        block = start + torch.nonzero(active[start : start + step]).flatten()
        masked, fallback = _masked(logits, block, suppress, suppress_ids)
        slot = slots[block].long()
        drawn = _draw(masked, fallback, params, slot, positions[block])
        tokens[block] = drawn.int()
        if last_token is not None:
            last_token[slot] = drawn.int()
        if logprobs is not None:
            logprobs[block] = _logprob(masked, drawn)


def _masked(
    logits: torch.Tensor, block: torch.Tensor, suppress: torch.Tensor | None, suppress_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float logits of some rows, suppressed ones and NaN at -inf; and the lowest id of each that is not suppressed."""
    values = logits[block].float()
    hidden = torch.zeros_like(values, dtype=torch.bool)
    if suppress is not None and suppress_ids is not None:
        ids = suppress_ids[(suppress_ids >= 0) & (suppress_ids < values.shape[1])].long()
        hidden[:, ids] = (suppress[block] != 0).unsqueeze(1)
    return values.masked_fill(hidden | values.isnan(), float("-inf")), (~hidden).int().argmax(1)


def _draw(
    logits: torch.Tensor, fallback: torch.Tensor, params: SamplingTable, slot: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Token ids int64 [rows] for float32 logits [rows, vocab] in which nothing is NaN."""
    best, greedy = logits.max(1)[0].unsqueeze(1), logits.argmax(1)
    greedy = torch.where(best.squeeze(1) == float("-inf"), fallback, greedy)
    temperature = params.temperature[slot]
    distance = distances(best, logits, torch.where(temperature > 0, temperature, 1.0).unsqueeze(1))
    weight = weights(distance)
    threshold = _threshold(distance, weight, params, slot)
    running = weight.masked_fill(distance > threshold.unsqueeze(1), 0).cumsum(1)
    total = running[:, -1]
    point = scaled(total, random62(params.seed[slot], positions.long()), 62)
    drawn = (running <= point.unsqueeze(1)).sum(1)
    return torch.where((temperature > 0) & (total > 0), drawn, greedy)


def distances(best: torch.Tensor, logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """X of the module's text, int64; float32 arguments that broadcast."""
    scale = torch.clamp(_SCALE / temperature, max=_MAX_SCALE)
    scaled = (best - logits) * scale
    return torch.where(scaled < LIMIT, scaled, float(LIMIT)).long()


def weights(distance: torch.Tensor) -> torch.Tensor:
    """Integer weights w in [0, 2^40] of distances X (int64 tensors)."""
    fraction = (distance & ((1 << UNIT_BITS) - 1)).float() * 2.0**-UNIT_BITS
    value = torch.full_like(fraction, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        value = value * fraction + coefficient
    weight = ((value * 2.0**30).long() << 10) >> (distance >> UNIT_BITS)
    return torch.where(distance < LIMIT, weight, 0)


def _threshold(distance: torch.Tensor, weight: torch.Tensor, params: SamplingTable, slot: torch.Tensor) -> torch.Tensor:
    """The largest distance that passes every filter of each row, int64 [rows]."""
    vocab = distance.shape[1]
    ordered, order = distance.sort(1)
    top_k = params.top_k[slot].long()
    top_k = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    threshold = ordered.gather(1, top_k.unsqueeze(1) - 1).squeeze(1).clamp(max=LIMIT - 1)
    threshold = torch.minimum(threshold, min_p_distance(params.min_p[slot]))

    top_p = params.top_p[slot]
    running = weight.gather(1, order).masked_fill(ordered > threshold.unsqueeze(1), 0).cumsum(1)
    share = (top_p.clamp(0, 1) * 2.0**31).long()
    target = scaled(running[:, -1], share, 31).clamp(min=1)
    reached = (running < target.unsqueeze(1)).sum(1, keepdim=True).clamp(max=vocab - 1)
    return torch.where(top_p < 1, torch.minimum(threshold, ordered.gather(1, reached).squeeze(1)), threshold)


def min_p_distance(min_p: torch.Tensor) -> torch.Tensor:
    """-log2(min_p) in units of 2^-25, rounded up, at most LIMIT - 1 (filter off): digit by digit, by squaring integers.

    Source of the method: Knuth, "The Art of Computer Programming" 1, section 1.2.2 (binary logarithms).
    """
    on = (min_p > 2.0**-40) & (min_p < 1)
    mantissa, exponent = torch.frexp(torch.where(on, min_p, 0.5))
    value = (mantissa * 2.0**31).long()  # [1, 2) in units of 2^-30
    logarithm = exponent.long() - 1
    for _ in range(UNIT_BITS):
        value = (value * value) >> 30
        bit = value >> 31
        value = value >> bit
        logarithm = (logarithm << 1) | bit
    return torch.where(on, -logarithm, torch.where(min_p >= 1, 0, LIMIT - 1)).clamp(max=LIMIT - 1)


def scaled(total: torch.Tensor, factor: torch.Tensor, bits: int) -> torch.Tensor:
    """floor(total * factor / 2^bits) for total < 2^62 and factor < 2^bits, bits 31 or 62, in limbs of 31 bits."""
    mask = (1 << 31) - 1
    high, low = total >> 31, total & mask
    if bits == 31:
        return high * factor + ((low * factor) >> 31)
    factor_high, factor_low = factor >> 31, factor & mask
    middle = high * factor_low + low * factor_high
    return high * factor_high + ((middle + ((low * factor_low) >> 31)) >> 31)


def _logprob(logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Log softmax at the drawn tokens; 0 where the best logit is +inf and -inf where every one is -inf."""
    best = logits.max(1)[0]
    chosen = torch.log_softmax(logits, 1).gather(1, drawn.unsqueeze(1)).squeeze(1)
    return torch.where(best.isinf(), torch.where(best > 0, 0.0, float("-inf")), chosen)
