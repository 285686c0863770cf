"""A decoder-only model: embedding, blocks, final norm, head. A family's spec chooses what they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from mii.modeling.blocks import make_block
from mii.modeling.experts import ExpertStack
from mii.modeling.forward import Forward
from mii.modeling.layers import Embedding, Norm, TiedHead
from mii.modeling.parameters import Linear, Module, Placement
from mii.modeling.spec import ModelSpec
from mii.ops.activation import activation
from mii.ops.gather import gather
from mii.ops.linear import pieces


class Decoder(Module):
    """Computes logits [samples, vocab] for the sampled rows of a step; a rank those of its part of the vocabulary."""

    def __init__(self, spec: ModelSpec, place: Placement) -> None:
        self.spec, self.place = spec, place
        self.embedding = Embedding(place, spec)
        self.blocks = [make_block(place, spec, layer) for layer in range(spec.num_layers)]
        for before, block in pairwise(self.blocks):
            block.follow(before)
        self.norm = Norm(place, spec, branch=self.blocks[-1].norms_branch) if spec.final_norm else None
        self.projection = Linear(place, spec.hidden_size, {"": spec.embedding_size}) if spec.embedding_size else None
        self.head = self._make_head()
        self._works_in_halves = all(block.works_in_halves for block in self.blocks)
        self.narrows = self.blocks[-1].narrows
        self.up_width = max(block.mlp.up_width for block in self.blocks)

    def _make_head(self) -> Linear | TiedHead:
        spec = self.spec
        if spec.tied_embeddings:
            return TiedHead(self.place, spec.vocab_span, bias=spec.head_bias)
        return Linear(self.place, spec.embedding_size or spec.hidden_size, {"": spec.vocab_span}, bias=spec.head_bias)

    def halves(self, tokens: int, *, captured: bool = False) -> Sequence[slice]:
        """The two pieces of a step of so many tokens whose sums over the ranks are worth overlapping; else none.
        `captured`: the step becomes a CUDA graph.
        """
        group, place = self.place.group, self.place
        num_bytes = tokens // 2 * self.spec.hidden_size * place.dtype.itemsize
        if group is None or not self._works_in_halves or not group.overlaps(num_bytes, captured=captured):
            return ()
        return list(pieces(tokens, -(-tokens // 2)))

    def forward(self, forward: Forward) -> torch.Tensor:
        buffers = forward.buffers
        self.embedding(buffers.residual, forward.ids, forward.positions)
        for block in self.blocks:
            block(forward, first=block is self.blocks[0], last=block is self.blocks[-1])
        if not len(buffers.logits):
            return buffers.logits  # a step of unfinished prompts only
        return self.project(forward)

    def project(self, forward: Forward) -> torch.Tensor:
        """Logits of the rows that `forward.sample_rows` names, from what the last block left for every token, or, where
        the step has a tail, for these.
        """
        buffers = forward.buffers
        last = self._last(forward)
        if self.projection is not None:
            last = self.projection(buffers.last_projected, last)
        logits = self.head(buffers.logits, last)
        if self.spec.logit_softcap:
            activation(logits, logits, "softcap", gated=False, limit=self.spec.logit_softcap)
        return logits

    def _last(self, forward: Forward) -> torch.Tensor:
        """The rows to project, normed where the model has a final norm."""
        buffers = forward.buffers
        stream, branch, out = buffers.last_residual, buffers.last, buffers.last_normed
        tail, adds_later = forward.tail, self.blocks[-1].adds_later
        if tail is not None:
            stream, branch = tail.buffers.residual, tail.buffers.branch
        else:
            gather(stream, buffers.residual, forward.sample_rows)
            if adds_later:
                gather(branch, buffers.branch, forward.sample_rows)
        if not adds_later:
            return stream if self.norm is None else self.norm(out, stream)
        return torch.add(stream, branch, out=out) if self.norm is None else self.norm(out, branch, stream)

    def finish(self) -> None:
        """Called when every weight is there."""
        linears = [module for _, module in self.modules() if isinstance(module, Linear)]
        for _, module in self.modules():
            if isinstance(module, Linear | ExpertStack):
                module.finish()
        self.embedding.finish()
        products: list[Linear | TiedHead] = [*linears]
        if isinstance(self.head, TiedHead):
            self.head.finish(self.embedding.weight.tensor)
            products.append(self.head)
        # They are attributes in the order in which a step computes them, and after one step comes the next.
        for product, following in zip(products, products[1:] + products[:1], strict=True):
            product.following = following.packed
