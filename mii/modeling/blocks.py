"""Decoder layers: how norms, attention and MLP are wired around the residual stream.

The addition to the residual stream is part of the norm that follows it. So a block finds in `residual` the stream
without what the block before it computed last, and in `branch` that remainder, which its first norm adds. It leaves
both in the same state, and the decoder's final norm adds the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Protocol

import torch

from mii.modeling.attention import Attention
from mii.modeling.forward import Forward
from mii.modeling.layers import BranchNorm, Norm
from mii.modeling.liveness import Life, life
from mii.modeling.mlp import MLP, DenseMLP, make_mlp
from mii.modeling.parameters import JointLinear, Module, Placement
from mii.modeling.spec import ModelSpec
from mii.ops import native
from mii.ops.all_reduce import Group, start_all_reduce
from mii.ops.gather import gather


class Block(Protocol):
    """A decoder layer.

    `adds_later`: whether its last branch is still to be added to the stream when it returns. `norms_branch`: whether
    that branch is normed before it is added; the weight then belongs to the norm that adds it. `hidden_life`: when it
    needs the buffer `hidden`. `works_in_halves`: whether it heeds `Forward.halves`. `narrows`: whether, as the last
    layer, it heeds `Forward.tail`.
    """

    adds_later: ClassVar[bool]
    norms_branch: ClassVar[bool]
    hidden_life: ClassVar[Life]
    narrows: ClassVar[bool]

    @property
    def mlp(self) -> MLP: ...

    @property
    def works_in_halves(self) -> bool: ...

    def follow(self, before: Block) -> None:
        """Called once with the layer before: its last branch is summed over the ranks here where that saves a step."""
        ...

    def leave_sum(self) -> Group | None:
        """Leaves the sum of its last branch to the layer that follows; see `Linear.leave_sum`."""
        ...

    def __call__(self, forward: Forward, first: bool, last: bool) -> None:
        """Takes the stream through the layer; `first`: nothing is left in `branch` by a layer before; `last`: no layer
        follows.
        """
        ...


class SequentialBlock(Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`: GPT-2, Llama and most since."""

    adds_later: ClassVar[bool] = True
    norms_branch: ClassVar[bool] = False
    hidden_life: ClassVar[Life] = life(("norm", "qkv"), ("mlp_norm", "up"))
    narrows: ClassVar[bool] = True

    def __init__(self, place: Placement, spec: ModelSpec, layer: int) -> None:
        self.attention_norm = Norm(place, spec, branch=self.norms_branch and layer > 0)
        self.attention = Attention(place, spec, layer)
        self.mlp_norm = Norm(place, spec, branch=self.norms_branch)
        self.mlp = make_mlp(place, spec, layer)
        self._sums_left: Group | None = None  # of the ranks, where the sum of the MLP is left to the layer that follows
        self._share_sums()

    def _share_sums(self) -> None:
        self.mlp_norm.add_up(self.attention)

    def follow(self, before: Block) -> None:
        self.attention_norm.add_up(before)

    def leave_sum(self) -> Group | None:
        self._sums_left = self.mlp.leave_sum()
        return self._sums_left

    @property
    def works_in_halves(self) -> bool:
        plain = type(self) is SequentialBlock and isinstance(self.mlp, DenseMLP) and self.attention.is_linear
        return plain and self.mlp_norm.group is not None

    def __call__(self, forward: Forward, first: bool, last: bool) -> None:
        if forward.halves:
            heads = self._attend_by_halves(forward, first)
        else:
            _norm_stream(self.attention_norm, forward, first)
            heads = self.attention.attend(forward, forward.buffers.hidden)
        _go_on(self._finish, forward, heads, last)

    def _finish(self, forward: Forward, heads: torch.Tensor, last: bool) -> None:
        """All that follows attention."""
        if forward.halves:
            self._finish_by_halves(forward, heads)
            return
        buffers = forward.buffers
        hidden, residual, branch = buffers.hidden, buffers.residual, buffers.branch
        self.mlp_norm(hidden, self.attention.to_norm(forward, branch, heads), residual)
        compute = self.mlp if last else self.mlp.to_norm  # of the last layer the sampled rows are picked first
        forward.left = compute(forward, branch, hidden)

    # The same; while a half's sum over the ranks is on its way, the other half is computed.

    def _attend_by_halves(self, forward: Forward, first: bool) -> torch.Tensor:
        buffers = forward.buffers
        hidden, residual, branch = buffers.hidden, buffers.residual, buffers.branch
        for index, half in enumerate(forward.halves):
            if first:
                self.attention_norm(hidden[half], residual[half])
            else:
                self.attention_norm.of_started(hidden[half], branch[half], residual[half], forward.sums[index])
            self.attention.project(forward, half, hidden[half])
        forward.sums = ()
        return self.attention.attend_projected(forward)

    def _finish_by_halves(self, forward: Forward, heads: torch.Tensor) -> None:
        buffers, halves, output = forward.buffers, forward.halves, self.attention.project_out
        hidden, residual, branch = buffers.hidden, buffers.residual, buffers.branch
        sums = [start_all_reduce(output(branch[half], heads[half]), self.mlp_norm.group) for half in halves]
        forward.sums = later = []
        for half, started in zip(halves, sums, strict=True):
            self.mlp_norm.of_started(hidden[half], branch[half], residual[half], started)
            later.append(start_all_reduce(self.mlp(forward, branch[half], hidden[half]), self._sums_left))


class SandwichBlock(SequentialBlock):
    """`x += norm(attention(norm(x))); x += norm(mlp(norm(x)))`: Gemma 2 and 3."""

    norms_branch: ClassVar[bool] = True

    def _finish(self, forward: Forward, heads: torch.Tensor, _last: bool) -> None:
        buffers = forward.buffers
        self.mlp_norm(buffers.hidden, self.attention.project_out(buffers.branch, heads), buffers.residual)
        forward.left = self.mlp(forward, buffers.branch, buffers.hidden)


class NormedBranchBlock(Module):
    """`x += norm(attention(x)); x += norm(mlp(x))`: OLMo-2, EXAONE-4."""

    works_in_halves: ClassVar[bool] = False
    adds_later: ClassVar[bool] = True
    norms_branch: ClassVar[bool] = True
    hidden_life: ClassVar[Life] = life()
    narrows: ClassVar[bool] = True

    def __init__(self, place: Placement, spec: ModelSpec, layer: int) -> None:
        self.attention_norm = BranchNorm(place, spec) if layer > 0 else None  # of what the layer before left
        self.attention = Attention(place, spec, layer)
        self.mlp_norm = BranchNorm(place, spec)
        self.mlp = make_mlp(place, spec, layer)

    def follow(self, before: Block) -> None:
        """Sums what it adds before it norms it, by itself."""

    def leave_sum(self) -> Group | None:
        return self.mlp.leave_sum()

    def __call__(self, forward: Forward, first: bool, last: bool) -> None:
        branch, residual = forward.buffers.branch, forward.buffers.residual
        if self.attention_norm is not None:
            self.attention_norm(branch, residual)
        _go_on(self._finish, forward, self.attention.attend(forward, residual), last)

    def _finish(self, forward: Forward, heads: torch.Tensor, _last: bool) -> None:
        branch, residual = forward.buffers.branch, forward.buffers.residual
        self.attention.project_out(branch, heads)
        self.mlp_norm(branch, residual)
        self.mlp(forward, branch, residual)


class NormedResidualBlock(SequentialBlock):
    """`y = norm(x); y += attention(y); x = norm(y); x += mlp(x)`: what is normed goes on as the stream (Bloom's option
    `apply_residual_connection_post_layernorm`).
    """

    hidden_life: ClassVar[Life] = life(("norm", "mlp_norm"))
    narrows: ClassVar[bool] = False

    def __call__(self, forward: Forward, first: bool, last: bool) -> None:
        buffers = forward.buffers
        hidden, residual, branch = buffers.hidden, buffers.residual, buffers.branch
        _norm_stream(self.attention_norm, forward, first)
        self.attention(forward, branch, hidden)
        self.mlp_norm(residual, branch, hidden)
        forward.left = self.mlp(forward, branch, residual)


class PostNormBlock(SequentialBlock):
    """`x = norm(x + attention(x)); x = norm(x + mlp(x))`: the first transformers, and OPT-350m."""

    adds_later: ClassVar[bool] = False
    hidden_life: ClassVar[Life] = life(("mlp_norm", "end"))

    def _share_sums(self) -> None:
        self.attention_norm.add_up(self.attention)
        self.mlp_norm.add_up(self.mlp)

    def follow(self, before: Block) -> None:
        """Nothing is left to add."""

    def __call__(self, forward: Forward, first: bool, last: bool) -> None:
        _go_on(self._finish, forward, self.attention.attend(forward, forward.buffers.residual), last)

    def _finish(self, forward: Forward, heads: torch.Tensor, _last: bool) -> None:
        buffers = forward.buffers
        hidden, residual, branch = buffers.hidden, buffers.residual, buffers.branch
        self.attention.project_out(branch, heads)
        self.attention_norm(hidden, branch, residual)
        self.mlp(forward, branch, hidden)
        self.mlp_norm(residual, branch, hidden)


class ParallelBlock(Module):
    """`y = norm(x); x += attention(y) + mlp(y)`, the sum being one product: GPT-J, Falcon-7B, Phi-2."""

    works_in_halves: ClassVar[bool] = False
    adds_later: ClassVar[bool] = True
    norms_branch: ClassVar[bool] = False
    hidden_life: ClassVar[Life] = life(("norm", "up"))
    narrows: ClassVar[bool] = True
    two_norms: ClassVar[bool] = False

    def __init__(self, place: Placement, spec: ModelSpec, layer: int) -> None:
        self.attention_norm = Norm(place, spec)
        self.mlp_norm = Norm(place, spec) if self.two_norms else None
        self.attention = Attention(place, spec, layer, project=False)
        self.mlp = DenseMLP(place, spec, project=False)
        biased = {"attention": spec.output_bias, "mlp": spec.mlp_bias}
        self.output = JointLinear(
            place,
            {"attention": spec.q_span, "mlp": spec.mlp_span},
            spec.hidden_size,
            [name for name, has_bias in biased.items() if has_bias],
        )

    def follow(self, before: Block) -> None:
        self.attention_norm.add_up(before)

    def leave_sum(self) -> Group | None:
        return self.output.leave_sum()

    def __call__(self, forward: Forward, first: bool, last: bool) -> None:
        hidden = forward.buffers.hidden
        _norm_stream(self.attention_norm, forward, first)
        _go_on(self._finish, forward, self.attention.attend(forward, hidden), last, normed=hidden)

    def _finish(self, forward: Forward, _heads: torch.Tensor, last: bool) -> None:
        buffers = forward.buffers
        if self.mlp_norm is not None:
            self.mlp_norm(buffers.hidden, buffers.residual)
        self.mlp.activate(forward, buffers.hidden)
        forward.left = (
            self.output(buffers.branch, buffers.joint)
            if last
            else self.output.to_norm(buffers.branch, buffers.joint, buffers.summands)
        )


class ParallelTwoNormsBlock(ParallelBlock):
    """`x += attention(norm(x)) + mlp(another_norm(x))`: GPT-NeoX, Falcon-40B."""

    two_norms: ClassVar[bool] = True


def _norm_stream(norm: Norm, forward: Forward, first: bool) -> None:
    """Norms the stream into `hidden`, after adding to it what the layer before left."""
    buffers = forward.buffers
    if first:
        norm(buffers.hidden, buffers.residual)
    else:
        assert forward.left is not None
        norm(buffers.hidden, forward.left, buffers.residual)


def _go_on(
    finish: Callable[[Forward, torch.Tensor, bool], None],
    forward: Forward,
    heads: torch.Tensor,
    last: bool,
    *,
    normed: torch.Tensor | None = None,
) -> None:
    """Finishes a layer whose attention is done: the last one for sampled rows alone, if only these are wanted.

    `normed`: the buffer `hidden`, if it is needed still.
    """
    tail, rows = forward.tail, forward.sample_rows
    if not last or tail is None:
        finish(forward, heads, last)
    elif len(rows):
        buffers = tail.buffers
        gather(buffers.residual, forward.buffers.residual, rows)
        gather(buffers.last_attention, heads, rows)
        if normed is not None:
            gather(buffers.hidden, normed, rows)
        if buffers.attention is not buffers.last_attention:  # it is a part of `joint`, as what was gathered from
            native.aside(partial(buffers.attention.copy_, buffers.last_attention))
        finish(tail, buffers.attention, last)


BLOCKS: dict[str, type[SequentialBlock | NormedBranchBlock | ParallelBlock]] = {
    "sequential": SequentialBlock,
    "sandwich": SandwichBlock,
    "normed_branch": NormedBranchBlock,
    "normed_residual": NormedResidualBlock,
    "post_norm": PostNormBlock,
    "parallel": ParallelBlock,
    "parallel_two_norms": ParallelTwoNormsBlock,
}


def make_block(place: Placement, spec: ModelSpec, layer: int) -> Block:
    """The decoder layer of a model, by `spec.block`."""
    return BLOCKS[spec.block](place, spec, layer)
