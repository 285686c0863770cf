"""The surface of DeepSpeed's ragged engine (`InferenceEngineV2`): the caller schedules, the engine answers with logits.

`put` runs one forward over chunks of sequences that the caller names by uid and returns the logits of each one's last
token. Sequences live until `flush`. They share blocks and slots with requests of `add_request`; a uid belongs to one
of the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from enum import Enum
from typing import TYPE_CHECKING

from mii.batching.data_classes import EngineRequest
from mii.batching.scheduler import Plan, Scheduler
from mii.engine.sequence import Sequence
from mii.errors import PipelineDestroyedError, RequestError

if TYPE_CHECKING:
    import torch

    from mii.engine.runner import Runner


class SchedulingResult(Enum):
    """Whether a batch can run, and if not, what it exceeds. Values as in DeepSpeed."""

    Success = 0
    EngineSequenceLimitExceeded = 1
    BatchSequenceLimitExceeded = 2
    BatchTokenLimitExceeded = 3
    KVCacheLimitExceeded = 4
    SequenceTokenLimitExceeded = 5


class SchedulingError(RuntimeError):
    """A batch given to `put` does not fit; `status` says what it exceeds."""

    def __init__(self, status: SchedulingResult) -> None:
        self.status = status
        super().__init__(f"The batch cannot be scheduled: {status.name}. Ask can_schedule() before put().")


class RaggedInterface:
    """Mixed into `Engine`, whose attributes it reads."""

    runner: Runner | None
    scheduler: Scheduler
    max_length: int
    block_size: int
    vocab_size: int
    _sequences: dict[int, Sequence]
    _ragged: dict[int, Sequence]

    @property
    def free_blocks(self) -> int:
        """KV blocks nobody refers to."""
        return self.scheduler.pool.num_free

    def put(
        self,
        batch_uids: SequenceOf[int],
        batch_tokens: SequenceOf[Iterable[int]],
        do_checks: bool = True,
    ) -> torch.Tensor:
        """Feeds the next tokens of each sequence in one forward.

        Args:
            batch_uids: A sequence each; an unknown uid starts one.
            batch_tokens: Token ids for each, as a tensor, array or list; at least one.
            do_checks: Ask `can_schedule` first.

        Returns:
            Logits of each sequence's last token, [len(batch_uids), vocab_size], in the order of `batch_uids`.

        Raises:
            SchedulingError: The batch does not fit.
            RequestError: A sequence without tokens, a uid twice, or an id outside the vocabulary.
        """
        tokens = [[int(token) for token in ids] for ids in batch_tokens]
        self._check_put(batch_uids, tokens)
        if do_checks:
            status = self.can_schedule(batch_uids, [len(ids) for ids in tokens])
            if status is not SchedulingResult.Success:
                raise SchedulingError(status)
        plan = Plan()
        for uid, ids in zip(batch_uids, tokens, strict=True):
            sequence = self._sequence(uid)
            if sequence.outgrows(sequence.length + len(ids)):
                self._renew(sequence, len(ids))
            self.scheduler.extend(plan, sequence, ids)
        assert self.runner is not None
        return self.runner.logits(plan)

    def _renew(self, sequence: Sequence, more: int) -> None:
        """Computes a sequence anew that is about to get so long that the model rotates all of it otherwise."""
        assert self.runner is not None
        tokens, sequence.tokens = sequence.tokens, []
        self.scheduler.close(sequence)
        sequence.restart()
        sequence.settle(len(tokens) + more)
        self.scheduler.open(sequence)
        most = self.scheduler.limits.max_tokens
        for start in range(0, len(tokens), most):
            plan = Plan()
            self.scheduler.extend(plan, sequence, tokens[start : start + most])
            self.runner.logits(plan)

    def _check_put(self, uids: SequenceOf[int], tokens: list[list[int]]) -> None:
        if self.runner is None:
            raise PipelineDestroyedError("The engine was destroyed; make a new one.")
        if len(uids) != len(tokens) or len(set(uids)) != len(uids):
            raise RequestError(f"put() needs one list of tokens for each of its uids, each uid once; got {list(uids)}.")
        for uid, ids in zip(uids, tokens, strict=True):
            if not ids or min(ids) < 0 or max(ids) >= self.vocab_size:
                raise RequestError(f"Sequence {uid}: needs token ids in 0..{self.vocab_size - 1}, at least one.")

    def _sequence(self, uid: int) -> Sequence:
        if uid not in self._ragged:
            if uid in self._sequences:
                raise RequestError(f"uid {uid} belongs to a request of add_request(); take another one for put().")
            assert self.runner is not None
            request = EngineRequest(uid=uid, prompt_ids=[], max_new_tokens=1)
            sequence = Sequence(request, self.max_length, switch=self.runner.rotation.switch)
            self.scheduler.open(sequence)
            self._ragged[uid] = sequence
        return self._ragged[uid]

    def query(self, uid: int, max_request_tokens: int, max_request_blocks: int) -> tuple[int, int]:
        """How many of `max_request_tokens` fit when `max_request_blocks` new blocks may be used: (tokens, blocks)."""
        sequence = self._ragged.get(uid)
        if sequence is None and not self.scheduler.free_slots:
            return 0, 0
        seen, held = (0, 0) if sequence is None else (sequence.computed, len(sequence.blocks))
        room = (held + max_request_blocks) * self.block_size - seen
        tokens = max(0, min(max_request_tokens, room, self.max_length - seen))
        return tokens, max(0, self.scheduler.pool.blocks_for(seen + tokens) - held)

    def can_schedule(self, uids: SequenceOf[int], lengths: SequenceOf[int]) -> SchedulingResult:
        """Whether `put` could take `lengths` tokens of these sequences now."""
        limits, new, blocks = self.scheduler.limits, 0, 0
        for uid, length in zip(uids, lengths, strict=True):
            sequence = self._ragged.get(uid)
            seen, held = (0, 0) if sequence is None else (sequence.computed, len(sequence.blocks))
            if seen + length > self.max_length:
                return SchedulingResult.SequenceTokenLimitExceeded
            new += sequence is None
            blocks += max(0, self.scheduler.pool.blocks_for(seen + length) - held)
        if new > self.scheduler.free_slots:
            return SchedulingResult.EngineSequenceLimitExceeded
        if len(uids) > limits.max_sequences:
            return SchedulingResult.BatchSequenceLimitExceeded
        if sum(lengths) > limits.max_tokens:
            return SchedulingResult.BatchTokenLimitExceeded
        return SchedulingResult.KVCacheLimitExceeded if blocks > self.free_blocks else SchedulingResult.Success

    def get_remaining_block_capacity(self, uid: int) -> int:
        """Tokens that still fit into the blocks a sequence holds; 0 for an unknown uid."""
        sequence = self._ragged.get(uid)
        return 0 if sequence is None else len(sequence.blocks) * self.block_size - sequence.computed

    def flush(self, uid: int) -> None:
        """Forgets a sequence and frees its blocks; unknown uids are ignored."""
        sequence = self._ragged.pop(uid, None)
        if sequence is not None:
            self.scheduler.close(sequence)
