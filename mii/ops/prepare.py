"""Step inputs: expands the host's short description of a step into ids, positions, KV slots and sampling rows.

The host says which slots take part, how many query tokens each feeds, how long each context then is and which token
ids it knows. Everything else is made on the device, so that a captured graph serves every step and sampled tokens never
visit the host on their way into the next step.

For sequence s of the step, its query tokens t in q_start[s] .. q_start[s+1]-1 and slot = seq_slot[s]:

    ids[t]       = host_ids[t] if host_ids[t] >= 0 else last_token[slot]
    positions[t] = kv_len[s] - q_start[s+1] + t
    kv_slots[t]  = block_table[slot, positions[t] // block_size] * block_size + positions[t] % block_size
    rope_rows[t] = positions[t] + rope_shift[s]     where steps have shifts; else rope_rows is positions itself

after the block table took its updates, (slot, index, block) triples of which no two name the same entry. For sample i,
with s = sample_seq[i],

    sample_rows[i] = q_start[s+1] - 1,  sample_slots[i] = seq_slot[s],  sample_positions[i] = kv_len[s]

Rows past the counts are padding: ids, positions, rope_rows, sample_rows and sample_positions 0, kv_slots and
sample_slots -1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mii.ops import abi, native
from mii.ops.staging import HostStep, Staging, StepLayout


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Every tensor of one engine's steps, all int32 on one device, under the names of `MiiPrepare`.

    The host's inputs are views into `packed`, one contiguous tensor, so one copy carries a step:

        host = step.host()              # numpy views of a staging buffer that no copy reads any more
        host.counts[abi.NUM_SEQS] = 2   # ... fill them
        step.upload()                   # one asynchronous copy on the current stream
        prepare(step, block_size)

    Attributes (S sequences, T tokens, U updates and B blocks a sequence at most):
        counts: [abi.COUNTS] how many of each there are in this step.
        seq_slot, kv_len, sample_seq: [S]. q_start: [S + 1]. host_ids: [T]. table_updates: [U, 3].
        rope_shift: [S], or [0] where steps have none.
        block_table: [slots, B], last_token: [slots]: state that outlives the step.
        ids, positions, kv_slots, rope_rows: [T] and sample_rows, sample_slots, sample_positions: [S], what `prepare`
            writes.
    """

    counts: torch.Tensor
    seq_slot: torch.Tensor
    q_start: torch.Tensor
    kv_len: torch.Tensor
    host_ids: torch.Tensor
    sample_seq: torch.Tensor
    rope_shift: torch.Tensor
    table_updates: torch.Tensor
    block_table: torch.Tensor
    last_token: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    rope_rows: torch.Tensor
    sample_rows: torch.Tensor
    sample_slots: torch.Tensor
    sample_positions: torch.Tensor
    packed: torch.Tensor
    staging: Staging

    @classmethod
    def allocate(
        cls,
        max_seqs: int,
        max_tokens: int,
        max_updates: int,
        max_blocks: int,
        slots: int,
        device: torch.device | str,
        *,
        shifted: bool = False,
    ) -> StepTensors:
        """Zeroed tensors for steps of up to these sizes; on a GPU with two pinned staging buffers for the inputs."""
        device = torch.device(device)
        staging = Staging(StepLayout(max_seqs, max_tokens, max_updates, shifted), device)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        positions = zeros(max_tokens)
        return cls(
            **staging.layout.views(staging.packed),
            block_table=zeros(slots, max_blocks),
            last_token=zeros(slots),
            ids=zeros(max_tokens),
            positions=positions,
            kv_slots=zeros(max_tokens),
            rope_rows=zeros(max_tokens) if shifted else positions,
            sample_rows=zeros(max_seqs),
            sample_slots=zeros(max_seqs),
            sample_positions=zeros(max_seqs),
            packed=staging.packed,
            staging=staging,
        )

    @property
    def max_seqs(self) -> int:
        return self.seq_slot.shape[0]

    @property
    def max_tokens(self) -> int:
        return self.host_ids.shape[0]

    def bucket(self, max_seqs: int, max_tokens: int) -> StepTensors:
        """The same memory with smaller bounds: what the graph of a smaller bucket works on and `upload` copies."""
        if not (0 < max_seqs <= self.max_seqs and 0 < max_tokens <= self.max_tokens):
            raise ValueError(
                f"a bucket of {max_seqs} sequences and {max_tokens} tokens does not fit step tensors of "
                f"{self.max_seqs} sequences and {self.max_tokens} tokens"
            )
        seqs = {
            name: getattr(self, name)[:max_seqs]
            for name in (
                *("seq_slot", "kv_len", "sample_seq", "rope_shift"),
                *("sample_rows", "sample_slots", "sample_positions"),
            )
        }
        tokens = {
            name: getattr(self, name)[:max_tokens] for name in ("host_ids", "ids", "positions", "kv_slots", "rope_rows")
        }
        return replace(self, q_start=self.q_start[: max_seqs + 1], **seqs, **tokens)

    def host(self) -> HostStep:
        """The numpy views to fill for the next step; they stay valid until `upload`."""
        return self.staging.host()

    def upload(self) -> None:
        """Queues the one copy that carries the filled views to the device (on the CPU they are the same memory)."""
        self.staging.upload(self.max_tokens)


def prepare(step: StepTensors, block_size: int) -> None:
    """Applies the step's block table updates and writes its ids, positions, KV slots and sampling rows.

    Args:
        step: the step's tensors, inputs uploaded. Counts are read on the device; the tensors' sizes are upper bounds.
        block_size: tokens of a KV block.
    """
    shifted = step.rope_shift.shape[0] > 0
    library = native.library(step.counts.device)
    if library is not None and library.has("mii_prepare"):
        args = abi.MiiPrepare(
            step.counts.data_ptr(),
            step.seq_slot.data_ptr(),
            step.q_start.data_ptr(),
            step.kv_len.data_ptr(),
            step.host_ids.data_ptr(),
            step.sample_seq.data_ptr(),
            step.table_updates.data_ptr(),
            step.block_table.data_ptr(),
            step.last_token.data_ptr(),
            step.ids.data_ptr(),
            step.positions.data_ptr(),
            step.kv_slots.data_ptr(),
            step.sample_rows.data_ptr(),
            step.sample_slots.data_ptr(),
            step.sample_positions.data_ptr(),
            step.rope_shift.data_ptr() if shifted else None,
            step.rope_rows.data_ptr() if shifted else None,
            step.seq_slot.shape[0],
            step.host_ids.shape[0],
            step.table_updates.shape[0],
            step.block_table.shape[1],
            block_size,
        )
        if library.call("mii_prepare", args, native.stream(step.counts.device)):
            return
    prepare_reference(step, block_size)


def prepare_reference(step: StepTensors, block_size: int) -> None:
    """`prepare` in plain torch; reads the counts on the host, so it cannot be captured in a graph."""
    seqs, tokens, samples, updates = step.counts[:4].tolist()
    slots, index, blocks = step.table_updates[:updates].unbind(1)
    step.block_table[slots.long(), index.long()] = blocks

    ends = step.q_start[1 : seqs + 1].contiguous()
    token = torch.arange(tokens, dtype=torch.int32, device=ends.device)
    seq = torch.searchsorted(ends, token, right=True)
    slot = step.seq_slot[seq].long()
    positions = step.kv_len[seq] - ends[seq] + token
    given = step.host_ids[:tokens]
    blocks = step.block_table[slot, (positions // block_size).long()]
    _fill(step.ids, torch.where(given >= 0, given, step.last_token[slot]), 0)
    _fill(step.positions, positions, 0)
    if step.rope_shift.shape[0]:
        _fill(step.rope_rows, positions + step.rope_shift[seq], 0)
    _fill(step.kv_slots, blocks * block_size + positions % block_size, -1)

    chosen = step.sample_seq[:samples].long()
    _fill(step.sample_rows, step.q_start[chosen + 1] - 1, 0)
    _fill(step.sample_slots, step.seq_slot[chosen], -1)
    _fill(step.sample_positions, step.kv_len[chosen], 0)


def _fill(out: torch.Tensor, values: torch.Tensor, padding: int) -> None:
    count = values.shape[0]
    out[:count] = values
    out[count:] = padding
