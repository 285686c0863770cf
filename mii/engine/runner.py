"""Runs planned steps on a device: owns the KV cache, the slots' state and the buffers, and knows nothing of requests'
text.

A step is: fill the host's staging buffer from the plan, one copy, `prepare`, the model, the sampler, and a copy of the
sampled tokens back that nobody waits for until `LaunchedStep.tokens` is called. Decoding sequences take their last
token from the device, so a step can be launched before the tokens of the step before have been read.

What few requests ask for beyond that (`mii.engine.extras`) follows a step before its tokens are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mii.batching.scheduler import Plan
from mii.engine.costs import count_weights
from mii.engine.extras import Extras
from mii.engine.graphs import Bucket, StepGraphs, graph_bucket, most_captured_tokens
from mii.engine.inputs import SentBlocks, TableUpdate, digest, fill_step
from mii.engine.rotation import Rotation
from mii.engine.sampling import Sampler
from mii.engine.scoring import LaunchedScores
from mii.engine.slots import Column
from mii.engine.timeline import Timeline
from mii.modeling.arena import ActivationArena
from mii.modeling.decoder import Decoder
from mii.modeling.forward import Forward
from mii.ops import abi
from mii.ops.all_reduce import Group
from mii.ops.attention import AttentionBatch, AttentionPlan
from mii.ops.logits import upload
from mii.ops.prepare import StepTensors, prepare
from mii.ops.recording import RecordedSteps
from mii.ops.sampler import SamplingTable
from mii.ops.shard_sampler import Draws


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """Sizes that are fixed when an engine starts: of a step, of a sequence, of a block."""

    max_tokens: int
    max_sequences: int
    max_slots: int
    max_length: int
    block_size: int

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_length // self.block_size)


class LaunchedStep:
    """A step on its way. `tokens()` waits for it and gives the sampled ids, one for each of `plan.sampled`: a view of
    memory that the step after the next one writes.

    `scores` can be read then, where requests ask for log-probabilities.
    """

    def __init__(
        self,
        plan: Plan,
        tokens: torch.Tensor,
        done: torch.cuda.Event | None,
        scores: LaunchedScores | None = None,
        group: Group | None = None,
    ) -> None:
        self.plan, self.scores = plan, scores
        self._tokens, self._done, self._group = tokens, done, group

    def tokens(self) -> Column:
        if self._done is not None and self._group is not None:
            self._group.wait(self._done)
        elif self._done is not None:
            self._done.synchronize()
        return self._tokens.numpy()[: len(self.plan.sampled)]


class SampledTokens:
    """Where sampled ids land: one tensor on the device, and two in pinned host memory, since two steps overlap."""

    def __init__(self, max_sequences: int, device: torch.device) -> None:
        self.on_device = torch.zeros(max_sequences, dtype=torch.int32, device=device)
        cuda = device.type == "cuda"
        self._on_host = [torch.zeros_like(self.on_device, device="cpu", pin_memory=True) for _ in range(2 * cuda)]
        self._done = [torch.cuda.Event() for _ in self._on_host]
        self._turn = 0

    def read_back(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Starts the copy of all ids to the host; the event tells when it is there. Both serve again in two steps."""
        if not self._on_host:
            return self.on_device, None
        self._turn ^= 1
        host, done = self._on_host[self._turn], self._done[self._turn]
        host.copy_(self.on_device, non_blocking=True)
        done.record()
        return host, done


class Runner:
    """One model on one device."""

    def __init__(
        self, model: Decoder, limits: RunnerLimits, stop_ids: tuple[int, ...] = (), *, weights: int | None = None
    ) -> None:
        """`weights`: numbers of the largest rank's part, so that all ranks capture the same steps."""
        self.model, self.limits = model, limits
        self.spec, self.device, self.dtype = model.spec, model.place.device, model.place.dtype
        self.rotation = Rotation(self.spec.ropes, limits.max_length, self.device)
        max_updates = limits.max_sequences + limits.max_tokens // limits.block_size + 8 * limits.max_blocks
        self.step = StepTensors.allocate(
            limits.max_sequences,
            limits.max_tokens,
            max_updates,
            limits.max_blocks,
            limits.max_slots,
            self.device,
            shifted=bool(self.rotation.switch),
        )
        self.arena = ActivationArena(self.spec, model.place, limits.max_tokens, limits.max_sequences, model.up_width)
        self.sampling = SamplingTable.allocate(limits.max_slots, self.device)
        self.agree: Callable[[int], None] | None = None
        """Called before each step with a digest of what it takes from the host, where ranks must compute the same."""
        self.sampler = Sampler(self.sampling, self.spec.vocab_span, model.place.group)
        self._sample_workspace = self.sampler.workspace(limits.max_sequences, self.dtype, self.device)
        self.sampled = SampledTokens(limits.max_sequences, self.device)
        self._suppress = torch.zeros(limits.max_sequences, dtype=torch.int32, device=self.device)
        self._suppress_ids = torch.tensor(stop_ids, dtype=torch.int32, device=self.device)
        self._any_suppressed = False
        self._suppressing = bool(stop_ids) and self.device.type == "cuda"  # a graph always reads the flags
        self._extras: Extras | None = None
        self.timeline: Timeline | None = None
        self.graph_bytes = 0  # of the graphs that were captured at the start
        self.graphs = StepGraphs(self.device) if self.device.type == "cuda" else None
        self.most_captured = most_captured_tokens(weights or count_weights(self.spec), limits.max_tokens)
        self._recorded = RecordedSteps()
        self._sent = SentBlocks(limits.max_slots)
        self._forwards: dict[Bucket, Forward] = {}
        self.plans = {
            window: AttentionPlan(
                q_heads=self.spec.q_heads,
                kv_heads=self.spec.kv_heads,
                head_dim=self.spec.head_dim,
                block_size=limits.block_size,
                window=window,
                max_seqs=limits.max_sequences,
                max_tokens=limits.max_tokens,
                max_blocks=limits.max_blocks,
                dtype=self.dtype,
                device=self.device,
            )
            for window in sorted(set(self.spec.windows))
        }
        self.caches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_blocks = 0

    # -- memory -------------------------------------------------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        return self.limits.block_size * self.spec.kv_bytes_per_token(self.dtype.itemsize)

    def make_cache(self, num_blocks: int) -> None:
        """K and V of every layer, [num_blocks, kv_heads, block_size, head_dim] each."""
        shape = (num_blocks, self.spec.kv_heads, self.limits.block_size, self.spec.head_dim)

        def cache() -> torch.Tensor:
            return torch.empty(shape, dtype=self.dtype, device=self.device)

        self.caches = [(cache(), cache()) for _ in range(self.spec.num_layers)]
        self.num_blocks = num_blocks
        self._forwards.clear()
        self._recorded = RecordedSteps()

    # -- one step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: Plan) -> LaunchedStep:
        """Starts a planned step and returns at once (on a GPU)."""
        forward, bucket, samples = self._begin(plan)
        tokens = self.sampled.on_device
        draws = self.sampler.plan(sequence.sampling for sequence in plan.sampled)
        if self.graphs is None and forward.cos_sin is self.rotation.tables:
            key = (*bucket, samples, self._suppressing, draws)
            self._recorded.run(key, lambda: self._execute(forward, tokens[:samples], draws))
        elif self.graphs is None:
            self._execute(forward, tokens[:samples], draws)
        elif forward.cos_sin is not self.rotation.tables or forward.positions.shape[0] > self.most_captured:
            self._execute(forward, tokens[: len(forward.sample_rows)], draws)
        else:
            self.graphs.run((*bucket, draws), lambda: self._execute(forward, tokens[: bucket.sequences], draws))
        scores = None
        if self._extras is not None:
            scores = self._extras.follow(plan, forward, tokens)
            if self._extras.idle:
                self._extras = None
        copied = self.sampled.read_back()
        if self.timeline is not None:
            self.timeline.launched()
        return LaunchedStep(plan, *copied, scores, self.model.place.group)

    @torch.inference_mode()
    def rehearse(self, bucket: Bucket, draws: Draws | None = None, *, capture: bool = False) -> None:
        """Runs a step of this size with nobody in it, so that kernels load and products choose their algorithms.

        Args:
            bucket: Of the step. The cache is not touched.
            draws: What the sampler exchanges, one of its `usual`; None: the first of them.
            capture: Keep it as a graph instead; it has to have run before.
        """
        forward, tokens = self._views(bucket, bucket.sequences), self.sampled.on_device
        draws = draws or self.sampler.usual[0]
        self.step.host().counts.fill(0)
        forward.step.upload()
        forward.cos_sin, forward.rope_rows = self.rotation.tables, forward.step.rope_rows
        if capture and self.graphs is not None:
            self.graphs.capture((*bucket, draws), lambda: self._execute(forward, tokens[: bucket.sequences], draws))
        else:
            self._execute(forward, tokens[: bucket.sequences], draws)

    @torch.inference_mode()
    def logits(self, plan: Plan) -> torch.Tensor:
        """Runs a planned step without drawing: the logits [samples, vocab] of its chunks that reach their end; of a
        part of the vocabulary on each rank of a group.
        """
        forward, _, samples = self._begin(plan)
        self._compute(forward)
        return forward.buffers.logits[:samples].clone()

    def _begin(self, plan: Plan) -> tuple[Forward, Bucket, int]:
        """Sends the plan to the device; the views that its step works on, its size, and how many chunks sample."""
        samples = self._fill(plan)
        if self.timeline is not None:
            self.timeline.done("fill")
        if self.agree is not None:
            self.agree(digest(self.step.host(), plan))
        bucket = self._bucket(plan)
        forward = self._views(bucket, samples if self.graphs is None else bucket.sequences)
        if self.timeline is not None:
            self.timeline.launches(plan.num_tokens, plan.num_sequences)
        forward.step.upload()
        self._send_suppressed(plan)
        forward.cos_sin, forward.rope_rows = self.rotation.tables, forward.step.rope_rows
        if self.rotation.needs_own_tables(plan):
            forward.cos_sin, forward.rope_rows = self.rotation.own_tables(plan, forward.positions.shape[0])
        return forward, bucket, samples

    def _execute(self, forward: Forward, tokens: torch.Tensor, draws: Draws | None = None) -> None:
        """Everything that a step does on the device, from the uploaded plan to the sampled tokens."""
        self._compute(forward)
        rows = tokens.shape[0]
        if not rows:
            return
        step = forward.step
        suppress = self._suppress[:rows] if self._suppressing else None
        self.sampler.sample(
            tokens,
            forward.buffers.logits[:rows],
            step.sample_slots[:rows],
            step.sample_positions[:rows],
            draws=draws,
            counts=step.counts,
            last_token=step.last_token,
            suppress=suppress,
            suppress_ids=None if suppress is None else self._suppress_ids,
            workspace=self._sample_workspace,
        )

    def _compute(self, forward: Forward) -> None:
        prepare(forward.step, self.limits.block_size)
        for attention_plan in forward.plans.values():
            attention_plan.update(forward.batch)
        self.model.forward(forward)

    def _send_suppressed(self, plan: Plan) -> None:
        """Flags the sampled rows that may not end yet. A graph always reads the flags, so they are cleared too."""
        if not len(self._suppress_ids):
            return
        last = [chunk.start + chunk.size < chunk.sequence.min_length for chunk in plan.prompts if chunk.samples]
        held = [] if plan.held is None else plan.held.tolist()
        before, self._any_suppressed = self._any_suppressed, True in held or True in last
        if self._any_suppressed:
            flags = [*(held or [False] * len(plan.decodes)), *last]
            self._suppress[: len(flags)].copy_(upload(flags, torch.int32, self.device))
        elif before:
            self._suppress.zero_()
        self._suppressing = self._any_suppressed or self.graphs is not None

    def _bucket(self, plan: Plan) -> Bucket:
        """The size of a step; with graphs, that of the graph for it."""
        tokens, sequences = plan.num_tokens, plan.num_sequences
        whole = any(chunk.sequence.prompt_scores is not None for chunk in plan.prompts)
        step = Bucket(tokens, sequences, tokens == sequences and not plan.reuses, whole)
        return step if self.graphs is None else graph_bucket(step, self.limits.max_sequences, self.limits.max_tokens)

    def _views(self, bucket: Bucket, samples: int) -> Forward:
        """What a step of this size works on."""
        forward = self._forwards.get(bucket)
        if forward is None:
            if len(self._forwards) >= 1024:
                self._forwards.clear()
            forward = self._forwards[bucket] = self._make_forward(bucket)
        if len(forward.sample_rows) != samples:
            self._narrow(forward, bucket, samples)
        return forward

    def _narrow(self, forward: Forward, bucket: Bucket, samples: int) -> None:
        """Makes a step one of which so many rows are sampled."""
        forward.buffers = self.arena.views(bucket.tokens, samples)
        forward.sample_rows, forward.tail = forward.step.sample_rows[:samples], None
        if bucket.narrows and self.model.narrows:
            counts = forward.step.counts[abi.NUM_SAMPLES - abi.NUM_TOKENS :]  # its tokens are those that are sampled
            forward.tail = replace(forward, buffers=self.arena.tail(samples), counts=counts, halves=())

    def _make_forward(self, bucket: Bucket) -> Forward:
        tokens, sequences = bucket[:2]
        step = self.step.bucket(sequences, tokens)
        batch = AttentionBatch(
            counts=step.counts,
            seq_slot=step.seq_slot,
            q_start=step.q_start,
            kv_len=step.kv_len,
            block_table=step.block_table,
            max_seqs=sequences,
            max_tokens=tokens,
        )
        forward = Forward(
            step=step,
            ids=step.ids,
            positions=step.positions,
            rope_rows=step.rope_rows,
            kv_slots=step.kv_slots,
            sample_rows=step.sample_rows,
            counts=step.counts,
            cos_sin=self.rotation.tables,
            caches=self.caches,
            batch=batch,
            plans=self.plans,
            buffers=self.arena.views(tokens, sequences),
            decodes=bucket.decodes,
            halves=self.model.halves(tokens, captured=tokens <= self.most_captured),
        )
        self._narrow(forward, bucket, sequences)
        return forward

    # -- from plan to tensors -----------------------------------------------------------------------------------------

    def _fill(self, plan: Plan) -> int:
        """Fills the staging buffer from a plan; returns how many rows sample."""
        host = self.step.host()
        updates = self._table_updates(plan)
        samples = fill_step(host, plan)
        if self.rotation.switch:
            sequences = (*plan.decodes, *(chunk.sequence for chunk in plan.prompts))
            host.rope_shift[: len(sequences)] = [self.rotation.switch * sequence.long for sequence in sequences]
        fitting = min(len(updates), len(host.table_updates))
        if fitting:
            host.table_updates[:fitting] = updates[:fitting]
        host.counts[abi.NUM_UPDATES] = fitting
        if fitting < len(updates):
            self._write_table(updates[fitting:])
        return samples

    def _write_table(self, updates: list[TableUpdate]) -> None:
        """Block table entries that did not fit into the step's buffer: long reused prefixes of many sequences."""
        slots, index, blocks = torch.tensor(updates, device=self.device).unbind(1)
        self.step.block_table[slots, index] = blocks.to(torch.int32)

    def _table_updates(self, plan: Plan) -> list[TableUpdate]:
        """Every block that the device does not know of yet; new sequences' sampling goes along."""
        updates, started = self._sent.updates(plan)
        if started:
            self.sampling.assign([s.slot for s in started], [s.sampling for s in started])
        for sequence in started:
            if sequence.special:
                self._extras = self._extras or Extras(self.model, self.arena, self.sampler)
                self._extras.add(sequence)
        return updates

    def forget(self) -> None:
        """Everything that was sent to the device counts as lost: after an interrupted step."""
        self._sent = SentBlocks(self.limits.max_slots)
        self._extras = None

    def destroy(self) -> None:
        """Drops the model, the cache and every buffer, so that the allocator can give the memory back."""
        vars(self).clear()
