"""The engine: requests in, tokens out, one step at a time.

`step()` plans the next forward, launches it and then reads the tokens of the one before, so that on a GPU the host
works while the device does. What a stop rule cuts off was computed for nothing by at most one token, which is dropped.

A request fails alone. If a step itself is interrupted (Ctrl-C, an error of the device), every sequence goes back to
the queue with all tokens it has, and since sampling depends on (seed, position) only, its text stays what it would
have been.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch

from mii.batching.data_classes import MAX_LOGPROBS, EngineRequest, StepOutput, TokenLogprob, TokenOutput
from mii.batching.pace import Pace
from mii.batching.scheduler import Scheduler, SchedulerLimits
from mii.engine.kv_cache import BlockPool
from mii.engine.profile import StepProfile
from mii.engine.ragged import RaggedInterface
from mii.engine.runner import LaunchedStep, Runner
from mii.engine.sequence import Sequence
from mii.engine.slots import Column, Mask
from mii.engine.startup import StartReport
from mii.engine.timeline import Timeline
from mii.errors import PipelineDestroyedError, PromptTooLongError, RequestError


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine does now, in counts; `prefix_hit_tokens` of `prefix_queried_tokens` came from the cache."""

    running: int
    waiting: int
    free_blocks: int
    num_blocks: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_queried_tokens: int


class Engine(RaggedInterface):
    """Schedules requests over one model.

    Args:
        runner: The model on its device.
        stop_ids: Every end-of-text id of the model.
        max_length: Prompt plus answer at most, in tokens.
        prefix_caching: Reuse the KV blocks of a common beginning.
        reserve_blocks: Free blocks kept for running sequences when a new one is admitted.
        pace: The time that a token may take, where one is kept.
        profile: Times the steps, where the config asks for it.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        stop_ids: tuple[int, ...],
        max_length: int,
        prefix_caching: bool = True,
        reserve_blocks: int | None = None,
        pace: Pace | None = None,
        profile: StepProfile | None = None,
    ) -> None:
        limits = runner.limits
        self.runner = runner
        self.stop_ids = stop_ids
        self.max_length = max_length
        self.vocab_size = runner.spec.vocab_size
        self.block_size = limits.block_size
        self.num_blocks = runner.num_blocks
        self._prefix_caching = prefix_caching
        reserve = runner.num_blocks // 100 if reserve_blocks is None else reserve_blocks
        self._scheduler_limits = SchedulerLimits(
            limits.max_tokens, limits.max_sequences, limits.max_slots, reserve, pace
        )
        self._profile = profile or StepProfile(runner.device, average=False, synchronise=False)
        self._timeline: Timeline | None = None
        self.start_report: StartReport | None = None  # where the time of its making went
        self._overlapped = runner.device.type == "cuda"
        self._sequences = {}
        self._ends = np.zeros(self.vocab_size, np.int32)  # for each token, how many requests it would end
        self._start_empty()

    def _start_empty(self) -> None:
        self.scheduler = Scheduler(
            self._scheduler_limits, BlockPool(self.num_blocks, self.block_size, self._prefix_caching)
        )
        self._pending: LaunchedStep | None = None
        self._ragged = {}

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def capacity(self) -> int:
        """Tokens of prompt and answer that one request can have: the model's limit or the whole cache, what is less."""
        return min(self.max_length, self.num_blocks * self.block_size)

    def add_request(self, request: EngineRequest) -> None:
        """Queues a request.

        Raises:
            PromptTooLongError: It could never run: the prompt alone exceeds the model's context or the whole KV cache.
            RequestError: The uid is in use, the prompt is empty, an id is outside the vocabulary, or the request asks
                for what cannot be.
        """
        self._check(request)
        assert self.runner is not None
        limit = min(len(request.prompt_ids) + request.max_new_tokens, self.capacity)
        rotation = self.runner.rotation
        salt = rotation.cache_salt(len(request.prompt_ids))
        sequence = Sequence(request, limit, salt, self.stop_ids, rotation.switch)
        self._sequences[request.uid] = sequence
        self._count_ends(request, 1)
        self.scheduler.add(sequence)

    def _check(self, request: EngineRequest) -> None:
        if self.runner is None:
            raise PipelineDestroyedError("The engine was destroyed; make a new one.")
        if request.uid in self._sequences:
            raise RequestError(f"Request {request.uid} is already running; every request needs its own uid.")
        if not request.prompt_ids:
            raise RequestError("The prompt has no tokens; give at least one.")
        if request.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {request.max_new_tokens}; at least 1 is needed.")
        self._check_ids("", request.prompt_ids)
        if request.sampling.changes_logits or request.logprobs is not None or request.prompt_logprobs is not None:
            self._check_special(request)
        length = len(request.prompt_ids)
        if length >= self.max_length:
            raise PromptTooLongError(
                f"The prompt has {length} tokens and the model takes {self.max_length} with the answer; shorten it."
            )
        if length >= self.capacity:
            raise PromptTooLongError(
                f"The prompt has {length} tokens and the whole KV cache holds {self.num_blocks * self.block_size} "
                f"({self.num_blocks} blocks of {self.block_size}); shorten it or give the cache more memory."
            )

    def _check_special(self, request: EngineRequest) -> None:
        """What few requests ask for."""
        sampling = request.sampling
        self._check_ids("logit_bias: ", sampling.logit_bias)
        self._check_ids("allowed tokens: ", sampling.allowed_ids)
        if not sampling.repetition_penalty > 0:
            raise RequestError(f"repetition_penalty is {sampling.repetition_penalty}; it must be above 0.")
        if sampling.allowed_ids and request.min_new_tokens and set(sampling.allowed_ids) <= set(request.stop_ids):
            raise RequestError(
                f"All allowed tokens end the answer, which shall have {request.min_new_tokens} tokens (min_new_tokens) "
                "before; allow another one."
            )
        for name, wanted in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
            if wanted is not None and not 0 <= wanted <= MAX_LOGPROBS:
                raise RequestError(f"{name} is {wanted}; 0 to {MAX_LOGPROBS} are allowed.")

    def _check_ids(self, what: str, ids: Collection[int]) -> None:
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(f"{what}Token id {wrong} is outside the vocabulary of {self.vocab_size} tokens.")

    def abort(self, uid: int) -> None:
        """Ends a request without an answer and frees all it holds; unknown uids are ignored."""
        sequence = self._sequences.pop(uid, None)
        if sequence is not None:
            self._count_ends(sequence.request, -1)
            self.scheduler.remove(sequence)

    def _count_ends(self, request: EngineRequest, by: int) -> None:
        # An id that a request names twice is counted once, by numpy's rule for repeated indices, and taken back once.
        self._ends[[token for token in request.stop_ids if 0 <= token < self.vocab_size]] += by

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Launches the next step and returns what the one before (on a CPU: this one) gave."""
        if self.runner is None:
            raise PipelineDestroyedError("The engine was destroyed; make a new one.")
        self._profile.begin()
        if self._timeline is not None:
            self._timeline.begin()
        try:
            before, self._pending = self._pending, self._launch()
            if not self._overlapped and before is None:
                before, self._pending = self._pending, None
            outputs = self._collect(before) if before is not None else StepOutput()
        except BaseException:
            self._recover()
            raise
        self._profile.end(len(outputs))
        if self._timeline is not None:
            self._timeline.done("read")
            self._timeline.end()
        return outputs

    def _launch(self) -> LaunchedStep | None:
        assert self.runner is not None
        plan = self.scheduler.schedule()
        self._done("plan")
        launched = self.runner.launch(plan) if plan else None
        if not plan and self.runner.agree is not None:
            self.runner.agree(0)
        self._done("launch")
        return launched

    def _done(self, part: str) -> None:
        if self._timeline is not None:
            self._timeline.done(part)

    def record(self, timeline: Timeline | None) -> None:
        """From now on every step is recorded there; None: no more."""
        self._timeline = timeline
        if self.runner is not None:
            self.runner.timeline = timeline

    def _collect(self, launched: LaunchedStep) -> StepOutput:
        """Reads a step's tokens; those of requests that ended meanwhile are dropped."""
        plan, tokens, slots = launched.plan, launched.tokens(), self.scheduler.slots
        self._done("wait")
        scores: dict[int, TokenLogprob] = {}
        if launched.scores is not None:
            scored = launched.scores.read(tokens.tolist())
            scores = {plan.sampled[row].uid: score for row, score in scored.items()}
        sequences, rows, known, output = plan.sampled, plan.sampled_slots, plan.known, StepOutput([], [], [])
        there = slots.ticket.take(rows) == plan.tickets
        if np.count_nonzero(there) < len(rows):
            output.others += self._collect_late(plan.sampled, tokens, ~there, scores)
            sequences, rows, tokens = list(compress(sequences, there.tobytes())), rows[there], tokens[there]
            known = known[there]
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.tokens.append(token)
        more = (known >= slots.comment.take(rows)) | (self._ends.take(tokens) > 0)
        if np.count_nonzero(more):
            output.others += [
                self._output(sequences[index], tokens.item(index), scores) for index in np.flatnonzero(more).tolist()
            ]
            sequences, tokens = list(compress(sequences, (~more).tobytes())), tokens[~more]
        output.uids, output.token_ids = [sequence.uid for sequence in sequences], tokens.tolist()
        return output

    def _collect_late(
        self, sequences: list[Sequence], tokens: Column, late: Mask, scores: dict[int, TokenLogprob]
    ) -> Iterator[TokenOutput]:
        """The tokens of those who lost their slots after the step was launched; the others of `late` have ended."""
        for index in np.flatnonzero(late).tolist():
            sequence = self._sequences.get(sequences[index].uid)
            if sequence is None or sequence is not sequences[index]:
                continue
            token = tokens.item(index)
            sequence.receive(token)
            yield self._output(sequence, token, scores)

    def _output(self, sequence: Sequence, token: int, scores: dict[int, TokenLogprob]) -> TokenOutput:
        """What there is to say of a token that may end its request, or that comes with more; ends the request."""
        reason = _finish_reason(sequence, token)
        if reason is not None:
            self.abort(sequence.uid)
        output = TokenOutput(sequence.uid, [token], reason)
        if sequence.special:
            output.logprobs = [scores[sequence.uid]] if sequence.uid in scores else None
            output.prompt_logprobs = sequence.take_prompt_scores()
        return output

    def _recover(self) -> None:
        """After an interrupted step nothing on the device is certain: all sequences start over with the tokens they
        have.
        """
        self._start_empty()
        if self.runner is not None:
            self.runner.forget()
        for sequence in self._sequences.values():
            sequence.restart()
            self.scheduler.add(sequence)

    # -- life ---------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        pool = self.scheduler.pool
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            free_blocks=pool.num_free,
            num_blocks=self.num_blocks,
            preemptions=self.scheduler.preemptions,
            prefix_hit_tokens=pool.hit_tokens,
            prefix_queried_tokens=pool.queried_tokens,
        )

    def destroy(self) -> None:
        """Gives the device's memory back. Harmless when called again."""
        if self.runner is None:
            return
        runner, self.runner = self.runner, None
        self._pending = None
        self._sequences.clear()
        self._start_empty()
        device = runner.device
        runner.destroy()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch._C._cuda_clearCublasWorkspaces()  # 32 MiB a stream, made again when needed
            torch.cuda.empty_cache()


def _finish_reason(sequence: Sequence, token: int) -> str | None:
    length = len(sequence.tokens)
    if token in sequence.request.stop_ids and length > sequence.min_length:
        return "stop"
    return "length" if length >= sequence.limit else None
