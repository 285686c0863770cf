"""What a forward works on: the buffers of a step, and the step as the layers see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mii.modeling.experts import ExpertBuffers
from mii.ops.all_reduce import StartedSum
from mii.ops.attention import AttentionBatch, AttentionPlan
from mii.ops.prepare import StepTensors
from mii.ops.summands import Summands


@dataclass(slots=True)
class Activations:
    """The buffers of one forward, [tokens, width] or [samples, width] each.

    What one holds is lost when its life ends (`mii.modeling.arena`): then another one lies in its place. Those whose
    names begin with `last` are for the sampled rows.

    `latent` are what latent attention makes queries, keys and values of, `experts` the buffers of a mixture of experts,
    where the model has them. `joint` is `attention` and `activated` side by side, where a block multiplies both at
    once; else it has no width. `summands`, floats of no shape, is for what `branch` is the sum of.
    """

    hidden: torch.Tensor
    residual: torch.Tensor
    branch: torch.Tensor
    latent: torch.Tensor
    qkv: torch.Tensor
    attention: torch.Tensor
    up: torch.Tensor
    activated: torch.Tensor
    joint: torch.Tensor
    last_attention: torch.Tensor
    last: torch.Tensor
    last_residual: torch.Tensor
    last_normed: torch.Tensor
    last_projected: torch.Tensor
    logits: torch.Tensor
    summands: torch.Tensor
    experts: ExpertBuffers | None = None


@dataclass(slots=True)
class Forward:
    """One step as the layers see it: what `prepare` wrote, the cache, the attention plans by window, the buffers.

    `cos_sin` has the rotary table of every layer, None for no rotation; `rope_rows` are the rows that the tokens take.

    `decodes`: each sequence has one token, of none is it a part of a prompt, so that nobody sees a key that another one
    gets in this step.

    `tail`: the step as its last layer sees it once attention is done, in a step of which few rows are sampled: of these
    rows alone, since nobody asks for what becomes of the others. None: all rows go on. `counts` are those of its rows.

    `left`: what a layer leaves to the next one's norm, once it has: `branch`, or what it is the sum of.

    `halves`: two pieces of a large step among ranks, each computed while sums of the other are on their way; else none.
    `sums`: those of the halves of `branch`, in their order, where they are still to be taken.
    """

    step: StepTensors
    ids: torch.Tensor
    positions: torch.Tensor
    rope_rows: torch.Tensor
    kv_slots: torch.Tensor
    sample_rows: torch.Tensor
    counts: torch.Tensor
    cos_sin: list[torch.Tensor | None]
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    batch: AttentionBatch
    plans: dict[int, AttentionPlan]
    buffers: Activations
    decodes: bool = False
    tail: Forward | None = None
    left: torch.Tensor | Summands | None = None
    halves: Sequence[slice] = ()
    sums: Sequence[StartedSum | None] = ()
